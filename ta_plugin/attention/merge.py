"""Merging partial softmax attention over disjoint sets of keys by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from ta_plugin.ops import merge_partials


def merge(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """N partial results into one: outs (N, Q, H, D), lses (N, Q, H) -> out (Q, H, D), lse (Q, H).

    out = sum_n exp(lse_n - lse) out_n with lse = logsumexp_n lse_n. A partial without keys has lse -inf and does not count;
    where all are -inf the result is 0 with lse -inf and gradient 0. Accumulates in float32 or wider, which lse is returned in;
    out is rounded once, to `dtype` or that of outs. Raises ValueError for shapes that do not fit.
    """
    return merge_partials(outs, lses, dtype)
