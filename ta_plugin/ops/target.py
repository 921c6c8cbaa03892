"""Few queries per sample onto rows gathered by index, as operators: `ta_plugin.attention.target_attention` is the contract.

Kernels: csrc/cpu/target_attention.cpp and csrc/target_attention/. The gradient of a table row is the sum over its members (the
keys that name it) in ascending order, never by atomics: forward and backward are bitwise repeatable. With `index` (K,) the gradient is
summed by it and not by `rows`, and is that of a part of the table's rows, (offsets.numel() - 1, Hk, D): see `RowsInPlace`. Order and
offsets are backward's: None where none will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ta_plugin.ops.registry import Operator
from ta_plugin.ops.segments import SEGMENT_SUM, Segments


@dataclass(frozen=True)
class RowsInPlace:
    """The rows of a table that keys name, where a gradient is wanted of those rows and not of the whole table.

    rows:     (K,) int64, the table row of each key
    segments: keys -> rows (G,) of the gradient; keys of one segment name one table row
    record:   takes that gradient (G, Hk, D), once per backward; None where nobody wants it
    stream:   handle of the CUDA stream that finds `segments`: what needs them follows there, and `record` also takes what it reads, to be
              kept until then; 0 where they are here
    """

    rows: Tensor
    segments: Segments
    record: Callable[..., None] | None
    stream: int = 0

    @property
    def num_members(self) -> int:
        """K."""
        return self.rows.shape[0]


def _forward_in_torch(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor,
    index: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    q_chunk: Tensor | None,
    max_seqlen_q: int,
    scale: float,
    normaliser: str,
) -> tuple[Tensor, Tensor]:
    """q (Q, H, D), tables (G, Hk, D), rows (K,) -> out (Q, H, D) and lse (Q, H), (0, H) without softmax; sample by sample."""
    out, lse = torch.zeros_like(q), _lse_like(q, normaliser)
    for (q0, q1), _, (x, w, _, v) in _samples(
        q, k_table, v_table, rows, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, scale, normaliser
    ):
        if normaliser == "softmax":
            score = (x + w).masked_fill(w == -torch.inf, -torch.inf)
            total = torch.logsumexp(score, 1)
            share = (score - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(1)).exp()
            lse[q0:q1] = total
        else:
            share = w * _activate(x, normaliser)
        out[q0:q1] = torch.einsum("tnh,nhd->thd", share, v).to(q.dtype)
    return out, lse


def _backward_in_torch(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor,
    index: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    q_chunk: Tensor | None,
    max_seqlen_q: int,
    scale: float,
    normaliser: str,
    out: Tensor,
    lse: Tensor,
    need_dweight: bool,
    sums: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk_table, dv_table ((0,) with one table), d(weight) of each pair (K, max_seqlen_q, H) ((0,) unless asked for), and (0,)."""
    wide, groups = lse.dtype, k_table.shape[1]
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros(rows.shape[0], *k_table.shape[1:], dtype=wide, device=q.device) for _ in range(2))
    dpairs = _pairs_like(q, rows, max_seqlen_q, wide).zero_() if need_dweight else lse.new_empty(0)
    for (q0, q1), (k0, k1), (x, w, k, v) in _samples(
        q, k_table, v_table, rows, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, scale, normaliser
    ):
        g = dout[q0:q1].to(wide)
        dp = torch.einsum("thd,nhd->tnh", g, v)
        if normaliser == "softmax":
            total = lse[q0:q1]
            p = (x + w - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(1)).masked_fill(
                w == -torch.inf, -torch.inf
            )
            p = p.exp()
            delta = (g * out[q0:q1].to(wide)).sum(-1) - (0.0 if dlse is None else dlse[q0:q1])
            ds = dw = (p * (dp - delta.unsqueeze(1))).masked_fill(w == -torch.inf, 0.0)
        else:
            p, ds, dw = w * _activate(x, normaliser), w * _slope(x, normaliser) * dp, _activate(x, normaliser) * dp
        dq[q0:q1] = (scale * torch.einsum("tnh,nhd->thd", ds, k)).to(q.dtype)
        for to, share, queries in ((dk, scale * ds, q[q0:q1].to(wide)), (dv, p, g)):
            per_head = torch.einsum("tnh,thd->nhd", share, queries)
            to[k0:k1] = per_head.view(k1 - k0, groups, q.shape[1] // groups, q.shape[2]).sum(2)
        if need_dweight:
            dpairs[k0:k1, : q1 - q0] = dw.transpose(0, 1).expand(-1, -1, q.shape[1])
    segments = rows if index is None else index, order, offsets
    if v_table is None:
        return dq, SEGMENT_SUM.in_torch(dk + dv, *segments).to(q.dtype), q.new_empty(0), dpairs, _nothing(q)
    dk, dv = (SEGMENT_SUM.in_torch(d, *segments).to(q.dtype) for d in (dk, dv))
    return dq, dk, dv, dpairs, _nothing(q)


def _samples(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    q_chunk: Tensor | None,
    scale: float,
    normaliser: str,
) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Bounds of queries and keys, and scaled scores (T, n, H), weights (T or 1, n, H or 1), keys and values (n, H, D)."""
    wide, repeat = _wide(q), q.shape[1] // k_table.shape[1]
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        index = rows[k0:k1]
        k = k_table[index].to(wide).repeat_interleave(repeat, 1)
        v = k if v_table is None else v_table[index].to(wide).repeat_interleave(repeat, 1)
        if weight is None:
            w = torch.full((1, k1 - k0), 0.0 if normaliser == "softmax" else 1.0, dtype=wide, device=q.device)
        else:
            w = weight[k0:k1].unsqueeze(0) if q_chunk is None else weight[q_chunk[q0:q1], k0:k1]
        w = w.unsqueeze(-1) if w.dim() == 2 else w
        if normaliser == "softmax":  # rows that no query sees may hold NaN
            absent = (w == -torch.inf).all(2).all(0)[:, None, None]
            k, v = k.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        x = scale * torch.einsum("thd,nhd->tnh", q[q0:q1].to(wide), k)
        yield (q0, q1), (k0, k1), (x, w, k, v)


def _activate(x: Tensor, normaliser: str) -> Tensor:
    return x * x.sigmoid() if normaliser == "silu" else x


def _slope(x: Tensor, normaliser: str) -> Tensor:
    if normaliser != "silu":
        return torch.ones_like(x)
    gate = x.sigmoid()
    return gate * (1 + x * (1 - gate))


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _pairs_like(q: Tensor, rows: Tensor, max_seqlen_q: int, dtype: torch.dtype) -> Tensor:
    return q.new_empty(rows.shape[0], max_seqlen_q, q.shape[1], dtype=dtype)


def _nothing(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.uint8)


def _lse_like(q: Tensor, normaliser: str) -> Tensor:
    return q.new_empty(q.shape[0] if normaliser == "softmax" else 0, q.shape[1], dtype=_wide(q))


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _lse_like(q, rest[-1])


def _backward_fake(dout: Tensor, dlse: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k_table, v_table, rows, index, _, offsets, *_, max_seqlen_q, _, _, _, lse, need_dweight, _ = inputs
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = q.new_empty(k_table.shape[0] if index is None else offsets.shape[0] - 1, *k_table.shape[1:])
    dv = q.new_empty(0) if v_table is None else torch.empty_like(dk)
    dpairs = _pairs_like(q, rows, max_seqlen_q, lse.dtype) if need_dweight else lse.new_empty(0)
    return dq, dk, dv, dpairs, _nothing(q)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.max_seqlen_q, ctx.scale, ctx.normaliser = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 14
    dq, dk, dv, dweight, _ = _gradients(ctx, dout, dlse, ctx.needs_input_grad[9], 0)
    return dq, dk, dv, *[None] * 6, dweight, *[None] * 4


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, need_dweight: bool, sums: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of q, tables and weight; and what is read on a stream `sums` beside the current one."""
    *tensors, out, lse = ctx.saved_tensors
    weight, q_chunk = tensors[9:11]
    need_dweight = need_dweight and weight is not None
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    tensors[0] = tensors[0].contiguous()  # a copy that the operator made would be gone before `sums` has read it
    dq, dk, dv, dpairs, scratch = TARGET_ATTENTION_BACKWARD(
        dout,
        dlse if ctx.normaliser == "softmax" else None,
        *tensors,
        ctx.max_seqlen_q,
        ctx.scale,
        ctx.normaliser,
        out,
        lse,
        need_dweight,
        sums,
    )
    dweight = _weight_gradient(dpairs, weight, q_chunk, *tensors[7:9]) if need_dweight else None
    kept = [dout, tensors[0], tensors[7], scratch] if sums else []
    return dq, dk, None if tensors[2] is None else dv, dweight, kept


class _InPlace(torch.autograd.Function):
    """The operator on a table outside of the graph, whose gradient `record` takes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: RowsInPlace, *inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = TARGET_ATTENTION(*inputs)
        _keep(ctx, inputs, output)
        ctx.record, ctx.stream = rows.record, rows.stream
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 16
        dq, dk, _, dweight, kept = _gradients(ctx, dout, dlse, ctx.needs_input_grad[11], ctx.stream)
        ctx.record(dk, *kept)
        return dq.new_empty(0), None, dq, *[None] * 8, dweight, *[None] * 4


def attend(
    q: Tensor, k_table: Tensor, v_table: Tensor | None, rows: Segments | RowsInPlace, *rest: Any
) -> tuple[Tensor, Tensor]:
    """`TARGET_ATTENTION`, with one table in place or with tables whose gradients are whole."""
    tensors = (q, k_table, v_table, *(x for x in rest if isinstance(x, Tensor)))
    if isinstance(rows, Segments):
        return TARGET_ATTENTION(q, k_table, v_table, rows.index, None, *rows.grouped_for(*tensors), *rest)
    segments = rows.segments
    if rows.record is None:
        return TARGET_ATTENTION(q, k_table, v_table, rows.rows, segments.index, *segments.grouped_for(*tensors), *rest)
    inputs = (q, k_table, v_table, rows.rows, segments.index, *segments.grouped, *rest)
    anchor = torch.empty(0, device=q.device, requires_grad=True)  # backward runs also where q needs no gradient
    return _InPlace.apply(anchor, rows, *inputs)


def _weight_gradient(
    pairs: Tensor, weight: Tensor, q_chunk: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """d(weight) from that of each pair (K, T, H), in weight's shape."""
    if q_chunk is None:
        return pairs.sum(1) if weight.dim() == 2 else pairs.sum((1, 2))
    keys, targets = pairs.shape[:2]
    pairs = pairs if weight.dim() == 3 else pairs.sum(2, keepdim=True)
    first = torch.repeat_interleave(cu_seqlens_q[:-1].long(), cu_seqlens_k.diff(), output_size=keys)
    key = torch.arange(keys, device=pairs.device)
    grad = torch.zeros(weight.shape[0] * keys, pairs.shape[2], dtype=pairs.dtype, device=pairs.device)
    for t in range(targets):  # within one t every key has a slot of its own: nothing depends on the order of additions
        chunk = q_chunk[(first + t).clamp(max=max(q_chunk.shape[0] - 1, 0))]  # past a sample's targets 0 is added
        grad.index_add_(0, chunk * keys + key, pairs[:, t])
    return grad.view(weight.shape[0], keys, *weight.shape[2:])


_INPUTS = (
    "Tensor q, Tensor k_table, Tensor? v_table, Tensor rows, Tensor? index, Tensor? order, Tensor? offsets, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? weight, Tensor? q_chunk, int max_seqlen_q, float scale, str normaliser"
)
TARGET_ATTENTION = Operator(
    "target_attention",
    f"({_INPUTS}) -> (Tensor out, Tensor lse)",
    _forward_in_torch,
    _forward_fake,
    _keep,
    _backward,
)
TARGET_ATTENTION_BACKWARD = Operator(
    "target_attention_backward",
    f"(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, bool need_dweight, int sums) "
    "-> (Tensor dq, Tensor dk_table, Tensor dv_table, Tensor dpairs, Tensor scratch)",
    _backward_in_torch,
    _backward_fake,
)
