"""torch's flash attention for the CPU, with what its public entry lacks: lse, gradients through lse and the weights, runs of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ta_plugin.attention.backends.padded import over_buckets
from ta_plugin.attention.buckets import nothing_seen
from ta_plugin.attention.runs import Runs

Grads = tuple[Tensor | None, ...]


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = False,
    runs: Runs | None = None,
    k_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract of `weighted_attention` on the CPU; the workspace is that of one call of the kernel.

    With `runs` each run is a call of its own, on views of its sample's first keys.
    """
    if scale == 0:  # the gradient of weights is divided by it
        q, scale = q * 0, 1.0
    if runs is None:
        return over_buckets(_Flash.apply, q, k, v, log_weight, cu_seqlens_q, cu_seqlens_k, scale, causal)
    spans = list(_spans(runs, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), k_visible, causal))
    if not spans:
        return nothing_seen(q, k, v, log_weight)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return _FlashRuns.apply(q, k, v, log_weight, spans, scale)


@dataclass(frozen=True)
class _Span:
    """Queries q0 .. q1 onto keys k0 .. k1 with a row of weights; `place`: the first query's in its sample when causal."""

    q0: int
    q1: int
    k0: int
    k1: int
    row: int
    place: int | None


def _spans(runs: Runs, cu_q: list[int], cu_k: list[int], k_visible: Tensor | None, causal: bool) -> Iterator[_Span]:
    visible = None if k_visible is None else k_visible.tolist()
    for (q0, q1), sample, row in zip(pairwise(runs.bounds), runs.samples, runs.chunks, strict=True):
        keys = cu_k[sample + 1] - cu_k[sample]
        if visible is not None:
            keys = min(keys, max(visible[row], 0))
        if causal:
            keys = min(keys, q1 - cu_q[sample])
        if keys:
            k0 = cu_k[sample]
            yield _Span(q0, q1, k0, k0 + keys, row, q0 - cu_q[sample] if causal else None)


class _FlashRuns(torch.autograd.Function):
    """Span by span; k and v as many heads as q. Nothing of the size of scores is kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, spans: list[_Span], scale: float
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        for span in spans:
            ks, vs, mask, keyless = _seen(span, k, v, weight)
            one_out, one_lse = _attend(q[span.q0 : span.q1][None], ks[None], vs[None], mask, keyless, scale, False)
            out[span.q0 : span.q1], lse[span.q0 : span.q1] = one_out[0], one_lse[0]
        ctx.spans, ctx.scale = spans, scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, weight, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Grads:
        q, k, v, weight, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out) if dout is None else dout
        need_dweight = weight is not None and ctx.needs_input_grad[3]
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))  # sums over spans
        dweight = torch.zeros_like(weight) if need_dweight else None
        for span in ctx.spans:
            rows, keys = slice(span.q0, span.q1), slice(span.k0, span.k1)
            ks, vs, mask, _ = _seen(span, k, v, weight)
            douts, qs, outs, lses = (x[rows][None] for x in (dout, q, out, lse))
            one_dq, one_dk, one_dv, columns = _attend_backward(
                douts,
                None if dlse is None else dlse[rows][None],
                qs,
                ks[None],
                vs[None],
                mask,
                outs,
                lses,
                ctx.scale,
                False,
                need_dweight,
            )
            dq[rows] = one_dq[0]
            dk[keys] += one_dk[0]
            dv[keys] += one_dv[0]
            if dweight is not None and columns is not None:
                at = dweight[span.row, keys]  # (n,) or (n, H)
                at += columns[0].sum(0) if at.dim() == 1 else columns[0].t()
        if dweight is not None:
            dweight.masked_fill_(weight == -torch.inf, 0.0)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dweight, None, None


def _seen(
    span: _Span, k: Tensor, v: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A span's keys and values (n, H, ...), its mask (1, H or 1, Tq, n), and which queries see nothing (1, H or 1, Tq)."""
    ks, vs, queries = k[span.k0 : span.k1], v[span.k0 : span.k1], span.q1 - span.q0
    mask, keyless = None, None
    if weight is not None:
        row = weight.detach()[span.row, span.k0 : span.k1].float()
        row = row.unsqueeze(0) if row.dim() == 1 else row.t()  # (H or 1, n)
        absent = row == -torch.inf
        if absent.any():  # 0 * NaN is NaN: what no query sees must not reach a product
            never = absent.all(0)[:, None, None]
            ks, vs = ks.masked_fill(never, 0.0), vs.masked_fill(never, 0.0)
            keyless = absent.all(-1)[None, :, None].expand(-1, -1, queries)
        mask = row[None, :, None, :].expand(-1, -1, queries, -1)
    if span.place is not None:
        last = torch.arange(span.place, span.place + queries)[:, None]
        later = torch.arange(span.k1 - span.k0) > last
        mask = torch.zeros(1, 1, *later.shape, dtype=torch.float32) if mask is None else mask
        mask = mask.masked_fill(later, -torch.inf)
        if keyless is not None:
            keyless = (mask == -torch.inf).all(-1)
    return ks, vs, mask, keyless


class _Flash(torch.autograd.Function):
    """The dense kernel of `over_buckets` on the CPU."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        keyless = None
        if weight is not None:
            present = weight > -torch.inf
            seen = present.cumsum(-1) > 0 if causal else present.any(-1, keepdim=True).expand(-1, -1, q.shape[1])
            keyless = ~seen
        out, lse = _attend(q, k, v, _mask(weight, q), keyless, scale, causal)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, weight, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Grads:
        q, k, v, weight, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out) if dout is None else dout
        need_dweight = weight is not None and ctx.needs_input_grad[3]
        mask = _mask(weight, q)
        dq, dk, dv, dweight = _attend_backward(dout, dlse, q, k, v, mask, out, lse, ctx.scale, ctx.causal, need_dweight)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
            dweight = dweight if weight.shape[1] > 1 else dweight.sum(1, keepdim=True)
            dweight = dweight.masked_fill(weight == -torch.inf, 0.0)
        return dq, dk, dv, dweight, None, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keyless: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """q (n, Tq, H, D), k, v (n, Tk, H, D), mask (n, H or 1, Tq, Tk), keyless (n, H or 1, Tq) -> out as q, lse (n, Tq, H)."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, attn_mask=mask, scale=scale
    )
    if keyless is not None and keyless.any():
        keyless = keyless.expand_as(lse)
        out, lse = out.masked_fill(keyless.unsqueeze(-1), 0.0), lse.masked_fill(keyless, -torch.inf)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv shaped as q, k, v, and when asked the column sums of dS (n, H, Tk): what a weight per key receives."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    lse, dim = lse.transpose(1, 2), q.shape[-1]
    lse = lse.masked_fill(
        lse == -torch.inf, torch.inf
    )  # exp(score - inf) = 0: a query without keys passes nothing back
    if dlse is not None or need_dweight:
        # The kernel forms dS = P * (dout.v - dout.out). One more column makes the bracket dout.v - (dout.out - dlse),
        # and a query column of ones against a key column of zeros collects the column sums of dS: d(log weight).
        q, k, v = _with_column(q, 1.0), _with_column(k, 0.0), _with_column(v, 0.0)
        out = _with_column(out, -1.0)
        shift = torch.zeros_like(lse) if dlse is None else dlse.transpose(1, 2)
        dout = torch.cat([dout, shift[..., None].to(dout)], -1)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.contiguous(), q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    columns = dk[..., dim] / scale if need_dweight else None
    dq, dk, dv = (x[..., :dim].transpose(1, 2) for x in (dq, dk, dv))
    return dq, dk, dv, columns


def _mask(weight: Tensor | None, q: Tensor) -> Tensor | None:
    """weight (n, H or 1, Tk), float32 whatever q is, as the kernel's additive mask, broadcast without a copy."""
    if weight is None:
        return None
    n, tq, heads = q.shape[:3]
    return weight[:, :, None, :].expand(n, heads if weight.shape[1] > 1 else 1, tq, weight.shape[2])


def _with_column(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), value)], -1)
