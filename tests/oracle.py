"""Attention over all positions, written as plainly as possible: what every layer of ta_plugin must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_over_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    score=None,
    normaliser: str = "softmax",
    activation=None,
    bias: Tensor | None = None,
    value_term: Tensor | None = None,
    multiplier: Tensor | None = None,
    visible: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One sample, loops over queries and heads: q (T, H, D), k (L, Hk, D), v (L, Hk, Dv) -> (T, H, Dv).

    bias, multiplier (L,) or (L, H); value_term (L, Hk or H, Dv); visible (T, L) bool; own: k (T, Hk, D), v (T, Hk, Dv).
    """
    heads, share = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rows = []
    for t in range(q.shape[0]):
        row = []
        for h in range(heads):
            g = h // share
            keys, values = k[:, g], v[:, g]
            if value_term is not None:
                values = values + value_term[:, h if value_term.shape[1] == heads else g]
            b = torch.zeros(k.shape[0], dtype=q.dtype) if bias is None else (bias if bias.dim() == 1 else bias[:, h])
            m = torch.ones(k.shape[0], dtype=q.dtype)
            if multiplier is not None:
                m = multiplier if multiplier.dim() == 1 else multiplier[:, h]
            if visible is not None:
                keys, values, b, m = (x[visible[t]] for x in (keys, values, b, m))
            if own is not None:
                keys, values = torch.cat([keys, own[0][t, g][None]]), torch.cat([values, own[1][t, g][None]])
                b, m = torch.cat([b, b.new_zeros(1)]), torch.cat([m, m.new_ones(1)])
            if keys.shape[0] == 0:
                row.append(v.new_zeros(v.shape[2]))
                continue
            if score is None:
                s = scale * keys @ q[t, h]
            else:  # all heads at once is the module's contract; take this head
                all_q = q[t].expand(1, 1, 1, heads, -1)
                all_k = torch.zeros(1, 1, keys.shape[0], heads, keys.shape[1], dtype=q.dtype)
                all_k[0, 0, :, h] = keys
                s = score(all_q, all_k)[0, 0, :, h]
            if normaliser == "softmax":
                row.append(torch.softmax(s + b, 0) @ values)
            else:
                row.append(((s if activation is None else activation(s)) * m) @ values)
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else v.new_zeros(0, heads, v.shape[2])
