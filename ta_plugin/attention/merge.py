"""Merging partial softmax attention over disjoint sets of keys by log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """N partial results into one: outs (N, Q, H, D), lses (N, Q, H) -> out (Q, H, D), lse (Q, H).

    out = sum_n exp(lse_n - lse) out_n with lse = logsumexp_n lse_n. A partial without keys has lse -inf and does not count;
    where all are -inf the result is 0 with lse -inf and gradient 0. Accumulates in float32 or wider.
    """
    wide = torch.promote_types(lses.dtype, torch.float32)
    lses = lses.to(wide)
    empty = lses == -torch.inf
    peak = lses.detach().amax(0)
    share = (lses - peak.masked_fill(peak == -torch.inf, 0.0)).masked_fill(empty, -torch.inf).exp()
    total = share.sum(0)
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    # outs of empty partials are 0 by contract; masking them keeps a NaN elsewhere from mattering
    weighted = (share / safe).unsqueeze(-1) * outs.to(wide).masked_fill(empty.unsqueeze(-1), 0.0)
    lse = (peak + safe.log()).masked_fill(none, -torch.inf)
    return weighted.sum(0).to(outs.dtype), lse
