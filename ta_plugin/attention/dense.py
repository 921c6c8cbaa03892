"""Attention with every score written out: any score function and normaliser, per-query weights, float64.

The reference the kernels are tested against, and the way for what no kernel covers (pairwise modules, SiLU, cutoffs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ta_plugin.attention.buckets import Side, bucketize, nothing_seen, padded_pieces

Normaliser = Literal["softmax", "none"]
Activation = Callable[[Tensor], Tensor]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    score: nn.Module | None = None,
    activation: Activation | None = None,
    normaliser: Normaliser = "softmax",
    causal: bool = False,
    q_chunk: Tensor | None = None,
    k_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q (Q, H, D), k (K, Hk, D), v (K, Hk, Dv) -> out (Q, H, Dv) in v's dtype and lse (Q, H), None without a normaliser.

    score:     None for scale * q.k; or a module called with q (n, Tq, 1, H, D) and k (n, 1, Tk, H, D) that returns
               (n, Tq, Tk, H) scores
    normaliser: "softmax": out = sum_u softmax(score + weight)_u v_u.  "none": out = sum_u weight_u activation(score_u) v_u
    weight:    (K,) or (K, H); with q_chunk (C, K) or (C, K, H). In softmax -inf removes a key
    q_chunk:   (Q,) int, the row of `weight` that each query uses
    k_visible: (C,) int, how many of its sample's keys a chunk sees, from the first
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    buckets = bucketize(cu_seqlens_q, cu_seqlens_k)
    if not buckets.sides:
        out, lse = nothing_seen(q, k, v, weight)
        return out, lse if normaliser == "softmax" else None
    keyed = None if weight is None else (weight.movedim(1, 0) if q_chunk is not None else weight)
    outs, lses = [], []
    for piece in padded_pieces(buckets, q, k, v, keyed, None if q_chunk is None else q_chunk.long()):
        q_side, k_side, chunk = piece.q_side, piece.k_side, piece.chunk
        qs, ks, vs = (x.to(wide) for x in (piece.q, piece.k, piece.v))
        weights = None if piece.weight is None else _per_query(piece.weight.to(wide), chunk)
        absent = _absent(k_side, q_side.length, causal, chunk, k_visible, weights if normaliser == "softmax" else None)
        if absent is not None:  # 0 * NaN is NaN: rows that no query sees must not reach a product
            never = absent.all(dim=2).all(dim=1)[:, :, None, None]
            ks, vs = ks.masked_fill(never, 0.0), vs.masked_fill(never, 0.0)
        scores = _scores(qs, ks, scale, score)  # (n, H, Tq, Tk)
        if normaliser == "softmax":
            out, lse = _softmax(scores, vs, weights, absent)
            lses.append(q_side.unpad(lse))
        else:
            out = _pointwise(scores, vs, weights, absent, activation)
        outs.append(q_side.unpad(out))
    out = buckets.join_q(outs, 0.0).to(v.dtype)
    return out, buckets.join_q(lses, -torch.inf) if normaliser == "softmax" else None


def _scores(q: Tensor, k: Tensor, scale: float, score: nn.Module | None) -> Tensor:
    repeat = q.shape[2] // k.shape[2]
    if score is not None:
        keys = k.repeat_interleave(repeat, 2) if repeat > 1 else k
        return score(q.unsqueeze(2), keys.unsqueeze(1)).permute(0, 3, 1, 2)
    n, tq, heads, dim = q.shape
    grouped = (
        q.reshape(n, tq, heads // repeat, repeat, dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(n, heads // repeat, repeat * tq, dim)
    )
    return (grouped * scale @ k.permute(0, 2, 3, 1)).reshape(n, heads, tq, k.shape[1])


def _weighted_values(share: Tensor, v: Tensor) -> Tensor:
    """share (n, H, Tq, Tk), v (n, Tk, Hk, Dv) -> (n, Tq, H, Dv)."""
    n, heads, tq, tk = share.shape
    groups = v.shape[2]
    out = share.reshape(n, groups, heads // groups * tq, tk) @ v.transpose(1, 2)
    return out.reshape(n, heads, tq, v.shape[3]).transpose(1, 2)


def _per_query(weights: Tensor, chunk: Tensor | None) -> Tensor:
    """Padded weights (n, Tk[, C][, H]) to (n, H or 1, Tq or 1, Tk)."""
    if chunk is None:
        return weights[:, None, None, :] if weights.dim() == 2 else weights.permute(0, 2, 1)[:, :, None, :]
    if weights.dim() == 3:
        weights = weights.unsqueeze(-1)
    sample = torch.arange(chunk.shape[0], device=chunk.device)[:, None]
    # indexed, not gathered: on CUDA the gradient of an index is added in order, that of gather by atomics
    return weights.transpose(1, 2)[sample, chunk].permute(0, 3, 1, 2)


def _absent(
    k_side: Side, tq: int, causal: bool, chunk: Tensor | None, k_visible: Tensor | None, log_weight: Tensor | None
) -> Tensor | None:
    """Which (query, key) slots do not exist, broadcastable to (n, H, Tq, Tk); None when all do."""
    hidden = []
    if k_side.slots is not None:
        hidden.append(~k_side.valid()[:, None, None, :])
    if log_weight is not None:
        hidden.append(log_weight.detach() == -torch.inf)
    if causal or k_visible is not None:
        device = chunk.device if chunk is not None else k_side.device
        key = torch.arange(k_side.length, device=device)
        if causal:
            hidden.append((key > torch.arange(tq, device=device)[:, None])[None, None])
        if k_visible is not None and chunk is not None:
            hidden.append(key >= k_visible.long()[chunk][:, None, :, None])
    absent = None
    for mask in hidden:
        absent = mask if absent is None else absent | mask
    return absent


def _softmax(scores: Tensor, v: Tensor, weights: Tensor | None, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    if weights is not None:
        scores = scores + weights.masked_fill(weights.detach() == -torch.inf, 0.0)
    if absent is not None:
        scores = scores.masked_fill(absent, -torch.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    share = (scores - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    total = share.sum(-1, keepdim=True)
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    lse = (peak + safe.log()).masked_fill(none, -torch.inf).squeeze(-1).transpose(1, 2)
    return _weighted_values(share / safe, v), lse


def _pointwise(
    scores: Tensor, v: Tensor, multiplier: Tensor | None, absent: Tensor | None, activation: Activation | None
) -> Tensor:
    share = scores if activation is None else activation(scores)
    if multiplier is not None:
        share = share * multiplier
    if absent is not None:
        share = share.masked_fill(absent, 0.0)
    return _weighted_values(share, v)
