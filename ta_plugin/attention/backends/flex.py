"""FlexAttention (CUDA): the weight rides in score_mod, lse and both gradients are torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch._dynamo.config
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(
        _attend, dynamic=True
    )  # compiled once: a closure built outside would compile anew at each call


def flex(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The dense kernel of `over_buckets` on CUDA."""
    if weight is not None:
        weight = weight.expand(-1, q.shape[2], -1).contiguous()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    # sizes of 1 compile apart from the rest (samples, queries, keys, with and without weights): more than the default of 8 variants,
    # and past the limit the kernel would silently be replaced by one that writes all scores out
    with torch._dynamo.config.patch(recompile_limit=64):
        out, lse = _compiled()(q, k, v, weight, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    def add_weight(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert weight is not None
        return score + weight[sample, head, key]

    return flex_attention(q, k, v, score_mod=None if weight is None else add_weight, scale=scale, return_lse=True)
