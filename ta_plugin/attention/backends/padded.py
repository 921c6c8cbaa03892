"""Running a dense kernel over the buckets of packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ta_plugin.attention.buckets import bucketize
from ta_plugin.ops.connect import connect

# q (n, Tq, H, D), k, v (n, Tk, H, D), weight (n, H or 1, Tk) or None, scale -> out (n, Tq, H, D), lse (n, Tq, H)
DenseKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


def over_buckets(
    kernel: DenseKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Packed q (Q, H, D), k, v (K, Hk, D), log_weight (K[, H]) through `kernel`, which never sees two samples' keys at once.

    Padded keys have weight -inf and zero rows; keys of weight -inf are zeroed, so that a NaN in them reaches nobody.
    """
    buckets = bucketize(cu_seqlens_q, cu_seqlens_k)
    wide = torch.promote_types(v.dtype, torch.float32)
    if not buckets.sides:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
        return connect(out, q, k, v, log_weight), connect(lse, q, k, v, log_weight)
    if log_weight is not None:
        log_weight = log_weight.to(wide)
        gone = (log_weight.detach() == -torch.inf).view(k.shape[0], -1).all(1)[:, None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    pieces = zip(
        buckets.sides,
        buckets.split_q(q),
        buckets.split_k(k),
        buckets.split_k(v),
        [None] * len(buckets.sides) if log_weight is None else buckets.split_k(log_weight),
        strict=True,
    )
    outs, lses = [], []
    for (q_side, k_side), q_rows, k_rows, v_rows, weight_rows in pieces:
        weight = None
        if weight_rows is not None:
            padded = k_side.pad(weight_rows)
            weight = padded.transpose(1, 2) if padded.dim() == 3 else padded.unsqueeze(1)
        if k_side.slots is not None:
            absent = ~k_side.valid().unsqueeze(1)
            zero = torch.zeros(absent.shape, dtype=wide, device=q.device)
            weight = (zero if weight is None else weight).masked_fill(absent, -torch.inf)
        out, lse = kernel(q_side.pad(q_rows), k_side.pad(k_rows), k_side.pad(v_rows), weight, scale)
        outs.append(q_side.unpad(out))
        lses.append(q_side.unpad(lse))
    return buckets.join_q(outs, 0.0), buckets.join_q(lses, -torch.inf)
