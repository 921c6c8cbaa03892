"""FlexAttention (CUDA): the weight rides in score_mod, lse and both gradients are torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ta_plugin.attention.backends.padded import over_buckets

LEAST_DIM = 16  # torch's kernel takes no smaller head dim; columns of zeros change nothing


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(
        _attend, dynamic=True
    )  # compiled once: a closure built outside would compile anew at each call


def flex_attention_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The contract of `weighted_attention` on CUDA, without chunks."""
    width = v.shape[2]
    q, k, v = (F.pad(x, (0, max(0, LEAST_DIM - x.shape[2]))) for x in (q, k, v))
    out, lse = over_buckets(_dense, q, k, v, log_weight, cu_seqlens_q, cu_seqlens_k, scale, causal)
    return out[..., :width], lse


def _dense(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if weight is not None:
        weight = weight.expand(-1, q.shape[2], -1)
        if weight.requires_grad and torch.is_grad_enabled():
            q, k, scale = _with_gradient(q, k, weight, scale)
        weight = weight.detach().contiguous()
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    # sizes of 1 compile apart from the rest (samples, queries, keys, with and without weights): more than the default of 8 variants,
    # and past the limit the kernel would silently be replaced by one that writes all scores out
    with torch._dynamo.config.patch(recompile_limit=64):
        out, lse = _compiled()(q, k, v, weight, scale, causal)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _with_gradient(q: Tensor, k: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """q, k (n, T, H, D) with one more column, through which `weight` (n, H, Tk) gets its gradient, and the scale.

    What score_mod captures gets its gradient by an atomic addition per score, in an order that does not repeat. A key column of zeros
    against a query column of ones adds nothing to a score, and its gradient is the weight's. Padded to what Triton would round up to.
    """
    if scale == 0:  # the column is divided by it
        q, scale = q * 0, 1.0
    weight = weight.masked_fill(weight == -torch.inf, 0.0)
    column = ((weight - weight.detach()) / scale).transpose(1, 2).unsqueeze(-1).to(k.dtype)
    spare = (1 << q.shape[3].bit_length()) - q.shape[3] - 1
    q = F.pad(torch.cat([q, q.new_ones(*q.shape[:3], 1)], -1), (0, spare))
    return q, F.pad(torch.cat([k, column], -1), (0, spare)), scale


def _attend(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    def modify(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if weight is not None:
            score = score + weight[sample, head, key]
        return torch.where(query >= key, score, -torch.inf) if causal else score

    plain = weight is None and not causal
    return flex_attention(q, k, v, score_mod=None if plain else modify, scale=scale, return_lse=True)
