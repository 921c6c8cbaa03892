"""Small head dims reach torch's kernel as the 16 columns it takes at least, which change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ta_plugin.attention import weighted_attention
from ta_plugin.attention.backends import flex
from ta_plugin.attention.dense import dense_attention


def test_columns_of_zeros_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(called: Any, q: Any, k: Any, v: Any, weight: Any, *bounds: Any, **options: Any) -> Any:
        scale, causal = bounds[2:]
        assert q.shape[2] == k.shape[2] == v.shape[2] == flex.LEAST_DIM
        return dense_attention(q, k, v, weight, *bounds[:2], scale=scale, causal=causal)

    monkeypatch.setattr(flex, "over_buckets", kernel)
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    for ours, exact in zip(
        flex.flex_attention_of(q, k, v, None, bounds, bounds, scale=0.3),
        weighted_attention(q, k, v, None, bounds, bounds, scale=0.3, return_lse=True, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)
