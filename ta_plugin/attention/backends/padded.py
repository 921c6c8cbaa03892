"""Running a dense kernel over the buckets of packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ta_plugin.attention.buckets import bucketize, nothing_seen, padded_pieces

# q (n, Tq, H, D), k, v (n, Tk, H, D), weight (n, H or 1, Tk) or None, scale, causal -> out (n, Tq, H, D), lse (n, Tq, H)
DenseKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool], tuple[Tensor, Tensor]]


def over_buckets(
    kernel: DenseKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Packed q (Q, H, D), k, v (K, Hk, D), log_weight (K[, H]) through `kernel`, which never sees two samples' keys at once.

    Padded keys have weight -inf and zero rows; keys of weight -inf are zeroed, so that a NaN in them reaches nobody.
    """
    buckets = bucketize(cu_seqlens_q, cu_seqlens_k)
    if not buckets.sides:
        return nothing_seen(q, k, v, log_weight)
    wide = torch.promote_types(v.dtype, torch.float32)
    if log_weight is not None:
        log_weight = log_weight.to(wide)
        gone = (log_weight.detach() == -torch.inf).view(k.shape[0], -1).all(1)[:, None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    outs, lses = [], []
    for piece in padded_pieces(buckets, q, k, v, log_weight):
        weight = piece.weight
        if weight is not None:
            weight = weight.transpose(1, 2) if weight.dim() == 3 else weight.unsqueeze(1)
        if piece.k_side.slots is not None and not causal:  # a causal query sees no padding: it lies behind it
            absent = ~piece.k_side.valid().unsqueeze(1)
            zero = torch.zeros(absent.shape, dtype=wide, device=q.device)
            weight = (zero if weight is None else weight).masked_fill(absent, -torch.inf)
        out, lse = kernel(piece.q, piece.k, piece.v, weight, scale, causal)
        outs.append(piece.q_side.unpad(out))
        lses.append(piece.q_side.unpad(lse))
    return buckets.join_q(outs, 0.0), buckets.join_q(lses, -torch.inf)
