"""What csrc/weighted_attention/binding.cpp promises, computed in float64 on the CPU: the kernel's place in tests of its wrapper."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (64, 96, 128)


def stand_in(log: list[dict[str, Any]] | None = None) -> Any:
    """A module of forward and backward; each call's options are appended to `log`."""
    log = [] if log is None else log

    def forward(
        q: Tensor, k: Tensor, v: Tensor, w: Tensor | None, cu_q: Tensor, cu_k: Tensor, scale: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        _check(q, k, v, w, cu_q, cu_k, scale, **options)
        log.append({"pass": "forward", "dim": q.shape[2], **options})
        with torch.no_grad():
            out, lse = _attend(q, k, v, w, cu_q, cu_k, scale, **options)
        return out.to(q.dtype), lse.float()

    def backward(
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor | None,
        out: Tensor,
        lse: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        scale: float,
        need_dlog_weight: bool = False,
        deterministic: bool = False,
        **options: Any,
    ) -> list[Tensor | None]:
        _check(q, k, v, w, cu_q, cu_k, scale, **options)
        _check_rows(dout, q)
        assert out.is_contiguous() and dout.shape == out.shape == q.shape
        assert dlse is None or (dlse.dtype == torch.float32 and dlse.is_contiguous() and dlse.shape == q.shape[:2])
        log.append(
            {"pass": "backward", "need": need_dlog_weight, "deterministic": deterministic, "dlse": dlse is not None}
        )
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        weight = None if w is None else w.detach().double().requires_grad_()
        asked = [*leaves, weight] if need_dlog_weight and weight is not None else leaves
        with torch.enable_grad():
            o, ls = _attend(*leaves, weight, cu_q, cu_k, scale, **options)
            loss = (o * dout.double()).sum() + sum(x[:0].sum() for x in asked)
            if dlse is not None:
                loss = loss + (ls.masked_fill(ls == -torch.inf, 0.0) * dlse.double()).sum()
        grads = torch.autograd.grad(loss, asked)
        dw = grads[3].float() if len(grads) == 4 else None
        return [*(g.to(q.dtype) for g in grads[:3]), dw]

    return SimpleNamespace(forward=forward, backward=backward)


def _check_rows(x: Tensor, q: Tensor) -> None:
    assert x.dim() == 3 and x.dtype == q.dtype and x.shape[2] == q.shape[2]
    aligned = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    assert x.numel() == 0 or aligned


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    cu_chunks: Tensor | None,
    k_visible: Tensor | None,
) -> None:
    for x in (q, k, v):
        _check_rows(x, q)
    assert q.shape[2] in HEAD_DIMS and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert scale > 0
    for x in (cu_q, cu_k, cu_chunks, k_visible):
        assert x is None or (x.dtype == torch.int32 and x.is_contiguous() and x.dim() == 1)
    chunks = cu_q.shape[0] - 1
    samples = cu_k.shape[0] - 1
    assert int(cu_q[-1]) == q.shape[0] and int(cu_k[-1]) == k.shape[0]
    if cu_chunks is None:
        assert chunks == samples and k_visible is None
    else:
        assert not causal and cu_chunks.shape[0] == samples + 1 and int(cu_chunks[-1]) == chunks
        assert k_visible is None or (k_visible.shape[0] == chunks and not (k_visible < 0).any())
    if w is not None:
        shape = tuple(w.shape) if cu_chunks is None else tuple(w.shape[1:])
        assert w.dtype == torch.float32 and shape in ((k.shape[0],), (k.shape[0], q.shape[1]))
        assert cu_chunks is None or w.shape[0] == chunks
        assert w.numel() == 0 or 0 not in w.stride()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    cu_chunks: Tensor | None,
    k_visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in (q, k, v))
    w = None if w is None else w.double()
    group = q.shape[1] // k.shape[1]
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1])]
    bounds = range(cu_k.shape[0]) if cu_chunks is None else cu_chunks.tolist()
    for sample in range(cu_k.shape[0] - 1):
        for chunk in range(bounds[sample], bounds[sample + 1]):
            k0, k1 = int(cu_k[sample]), int(cu_k[sample + 1])
            if k_visible is not None:
                k1 = min(k1, k0 + int(k_visible[chunk]))
            qs = q[int(cu_q[chunk]) : int(cu_q[chunk + 1])]
            ks, vs = (x[k0:k1].repeat_interleave(group, 1) for x in (k, v))
            row = q.new_zeros(k1 - k0) if w is None else (w if cu_chunks is None else w[chunk])[k0:k1]
            row = row[:, None].expand(-1, q.shape[1]) if row.dim() == 1 else row
            absent = (row == -torch.inf).t()[:, None].expand(-1, len(qs), -1)
            if causal:
                absent = absent | (torch.arange(k1 - k0) > torch.arange(len(qs))[:, None])
            scores = torch.einsum("ihd,jhd->hij", qs, ks) * scale + row.masked_fill(row == -torch.inf, 0.0).t()[:, None]
            scores = scores.masked_fill(absent, -1e30)
            none = absent.all(-1) if k1 > k0 else torch.ones(q.shape[1], len(qs), dtype=torch.bool)
            share = scores.softmax(-1).masked_fill(absent, 0.0) if k1 > k0 else scores
            lses.append(
                (
                    scores.logsumexp(-1).masked_fill(none, -torch.inf)
                    if k1 > k0
                    else q.new_full((q.shape[1], len(qs)), -torch.inf)
                ).t()
            )
            outs.append(torch.einsum("hij,jhd->ihd", share, vs))
    return torch.cat(outs), torch.cat(lses)
