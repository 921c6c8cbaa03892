"""What the flex backend hands to FlexAttention, which has no backward on the CPU: a softmax written out takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from weighted_problems import Problem, by_loops, gradients, tensors

from ta_plugin.attention.backends import flex

TINY = 1e-300
Sizes = tuple[tuple[int, int], ...]


def written_out(seen: list[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place of `_attend`: notes the head_dim of keys, and takes no gradient to weights, which FlexAttention adds by atomics."""

    def attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float, causal: bool) -> Any:
        seen.append(k.shape[3])
        scores = scale * q @ k.transpose(2, 3)
        if weight is not None:
            assert weight.is_contiguous() and not weight.requires_grad
            scores = scores + weight[:, :, None]
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        top = scores.detach().amax(-1, keepdim=True).clamp(min=-1e9)
        share = (scores - top).exp()
        total = share.sum(-1, keepdim=True)
        lse = torch.where(total > 0, total.clamp(min=TINY).log() + top, -torch.inf)
        return share / total.clamp(min=TINY) @ v, lse[..., 0]

    return attend


@pytest.mark.parametrize("scale", [0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("weight", "dim"), [("none", 4), ("none", 16), ("shared", 16), ("per_head", 15)])
@pytest.mark.parametrize("sizes", [((3, 5), (0, 2), (4, 0), (6, 7)), ((5, 5), (5, 5))])
def test_weights_get_their_gradient_through_a_column(
    sizes: Sizes, weight: str, dim: int, causal: bool, scale: float
) -> None:
    call = tensors(Problem(sizes, 4, 2, weight=weight, absent=0.3, causal=causal, seed=1), dim=dim)
    call["scale"] = scale
    seen: list[int] = []
    with patch.object(flex, "_compiled", lambda: written_out(seen)):
        got = flex.flex_attention_of(**call)
        with torch.no_grad():
            flex.flex_attention_of(**call)
    want = by_loops(call)
    for ours, exact in zip((*got, *gradients(*got, call)), (*want, *gradients(*want, call)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    half = (
        len(seen) // 2
    )  # room for the column where there is a gradient to carry, and nothing wider than the least where there is none
    assert set(seen[:half]) == {16 if weight == "none" else 32} and set(seen[half:]) == {16}
