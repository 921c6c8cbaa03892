"""The functions of csrc/weighted_attention/binding.cpp, every score written out, in whatever dtype is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out (Q, H, D), lse (Q, H); written to those given."""
    scores = _scores(q, k, weight, cu_q, cu_k, scale, **options)
    total = scores.logsumexp(-1)
    share = (scores - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp()
    return _written(torch.einsum("hij,jhd->ihd", share, _wide(v, q)), out), _written(total.T.contiguous(), lse)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    need_dlog_weight: bool,
    deterministic: bool,
    dq: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the kernel forms them: P from the lse it is given, dS = P (dout.v - dout.out + dlse)."""
    assert dout.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    share = (_scores(q, k, weight, cu_q, cu_k, scale, **options) - lse.T[..., None]).exp()
    outer = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse
    ds = share * (torch.einsum("ihd,jhd->hij", dout, _wide(v, q)) - outer.T[..., None])
    fold = (k.shape[0], k.shape[1], q.shape[1] // k.shape[1], k.shape[2])
    of_q = _written(scale * torch.einsum("hij,jhd->ihd", ds, _wide(k, q)), dq)
    dk = scale * torch.einsum("hij,ihd->jhd", ds, q).reshape(fold).sum(2)
    dv = torch.einsum("hij,ihd->jhd", share, dout).reshape(fold).sum(2)
    if not need_dlog_weight:
        return of_q, dk, dv, None
    assert weight is not None
    if "cu_chunks" not in options:
        return of_q, dk, dv, ds.sum(1).T if weight.dim() == 2 else ds.sum((0, 1))
    dw = torch.zeros(cu_q.numel() - 1, k.shape[0], q.shape[1], dtype=q.dtype)
    dw.index_add_(0, _of(cu_q), ds.permute(1, 2, 0))
    return of_q, dk, dv, dw if weight.dim() == 3 else dw.sum(-1)


def _written(result: Tensor, to: Tensor | None) -> Tensor:
    if to is None:
        return result
    assert to.is_contiguous() and to.shape == result.shape
    return to.copy_(result)


def _of(bounds: Tensor) -> Tensor:
    return torch.repeat_interleave(bounds.diff().long())


def _wide(rows: Tensor, q: Tensor) -> Tensor:
    return rows.repeat_interleave(q.shape[1] // rows.shape[1], 1)


def _scores(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool = False,
    cu_chunks: Tensor | None = None,
    k_visible: Tensor | None = None,
) -> Tensor:
    """(H, Q, K), -inf where a query does not see a key."""
    scores = scale * torch.einsum("ihd,jhd->hij", q, _wide(k, q))
    chunk, of_key = _of(cu_q), _of(cu_k)
    sample = chunk if cu_chunks is None else _of(cu_chunks)[chunk]
    place = torch.arange(k.shape[0]) - cu_k.long()[of_key]
    seen = sample[:, None] == of_key
    if causal:
        seen &= (torch.arange(q.shape[0]) - cu_q.long()[chunk])[:, None] >= place
    if k_visible is not None:
        seen &= place < k_visible.long()[chunk][:, None]
    if weight is not None:
        rows = weight[chunk] if cu_chunks is not None else weight[None]
        scores = scores + (
            rows[None] if rows.dim() == 2 and (cu_chunks is not None or weight.dim() == 1) else rows.movedim(-1, 0)
        )
    return scores.masked_fill(~seen, -torch.inf)
