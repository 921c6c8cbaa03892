"""FlexAttention (CUDA): the weight rides in score_mod, lse and both gradients are torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The dense kernel of `over_buckets` on CUDA."""

    def add_weight(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert weight is not None
        return score + weight[sample, head if weight.shape[1] > 1 else 0, key]

    out, lse = _compiled()(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)),
        score_mod=None if weight is None else add_weight,
        scale=scale,
        return_lse=True,
    )
    return out.transpose(1, 2), lse.transpose(1, 2)
