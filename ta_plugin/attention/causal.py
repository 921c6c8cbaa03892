"""Causal attention of every position onto all before it, with keys and values held once per distinct token (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ta_plugin.attention.causal_parts import ContractParts, KernelParts, Part, Rows, parts_for
from ta_plugin.attention.chunk_cost import choose_chunk
from ta_plugin.attention.chunks import CausalChunks, Group
from ta_plugin.attention.prefix import Decay, PrefixCounts, PrefixDecay
from ta_plugin.attention.weighted import weighted_attention
from ta_plugin.ops import expand
from ta_plugin.ops.connect import connect
from ta_plugin.unique_space import UniqueSpace


@overload
def causal_attention(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = ...,
    times: Tensor | None = ...,
    scale: float | None = ...,
    chunk: int | CausalChunks | None = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def causal_attention(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = ...,
    times: Tensor | None = ...,
    scale: float | None = ...,
    chunk: int | CausalChunks | None = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_attention(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    times: Tensor | None = None,
    scale: float | None = None,
    chunk: int | CausalChunks | None = None,
    deterministic: bool = True,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_{j <= i} softmax_j(scale * q_i.k(t_j) - decay * (time_i - time_j)) v(t_j) over each sample's occurrences j.

    Equal to plain causal attention over positions wherever equal tokens have equal keys and values. Work per head is about
    M * U / (1 + beta) + M * chunk / 2 query-key pairs, U growing like M ** beta, instead of M ** 2 / 2.

    space:  of B samples (documents), M occurrences and U distinct rows
    q:      (M, H, D), a query per occurrence, packed sample by sample in order (`space.pack` packs a padded grid)
    k, v:   (U, Hk, D), (U, Hk, Dv), the rows of `space`; Hk divides H
    decay:  (H,) floating, per head: ALiBi slopes (`alibi_slopes`), or learned; gradients flow to it
    times:  (M,) non-decreasing within each sample, what the decay counts; the position within the sample by default. Weights are
            formed in float32 (float64 for float64): decay times a chunk's span of time is best kept below about 1e4
    scale:  D ** -0.5 by default
    chunk:  positions per chunk, or the `CausalChunks` of this space built once for all layers; by default what `choose_chunk` says.
            Where it covers every sample, as the cost model says of short ones, this is attention over keys at all M positions
    deterministic, backend: as for `weighted_attention`

    Returns out (M, H, Dv) in v's dtype, and with return_lse lse (M, H), biases included, float32 or wider. Beside inputs and outputs,
    memory holds the keys of one group of chunks at their positions and prefix weights no larger than k; backward builds both anew, and sums
    the gradients of k and v in float32 or wider. Raises ValueError for inputs that do not fit the space.
    """
    _check(space, q, k, v, decay, times, chunk)
    if space.num_occurrences == 0:
        out, lse = q.new_zeros(*q.shape[:2], v.shape[2], dtype=v.dtype), q.new_zeros(q.shape[:2], dtype=_wide(q))
        out, lse = connect(out, q, k, v, decay), connect(lse, q, k, v, decay)
        return (out, lse) if return_lse else out
    if chunk is None:
        chunk = choose_chunk(space, q.shape[1], q.shape[2], q.device, decay is not None).size
    chunks = chunk if isinstance(chunk, CausalChunks) else CausalChunks.of(space, chunk)
    if decay is not None and times is None:
        times = space.positions()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    parts = parts_for(q, v, scale, backend, deterministic)
    if chunks.one_per_sample and not parts.reads_results:  # nothing to merge: backward need not compute it again
        out, lse = _over_positions(space, q, k, v, decay, times, scale, deterministic, backend)
    else:
        out, lse = _Causal.apply(q, k, v, decay, _Call(chunks, times, parts))
    return (out, lse) if return_lse else out


def _over_positions(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    times: Tensor | None,
    scale: float,
    deterministic: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The same function where samples are short: rows expanded to their occurrences, and one causal call."""
    keys, values = expand(k, space.segments), expand(v, space.segments)
    cu_seqlens, bias = space.cu_occurrences.int(), None
    if decay is not None:
        assert times is not None
        # as within a chunk: times count from the middle of the sample, and a query's own term shifts its log-sum-exp
        middle = (space.cu_occurrences[:-1] + space.cu_occurrences[1:]).div(2, rounding_mode="floor")
        reference = times[middle.clamp(max=times.numel() - 1)][space.sample_of_occurrences()]
        bias = (times - reference).to(_wide(q)).unsqueeze(1) * decay.to(_wide(q))
    out, lse = weighted_attention(
        q,
        keys,
        values,
        bias,
        cu_seqlens,
        cu_seqlens,
        scale=scale,
        causal=True,
        return_lse=True,
        deterministic=deterministic,
        backend=backend,
    )
    return out, lse if bias is None else lse - bias


@dataclass(frozen=True)
class _Call:
    """What a call holds besides tensors that have gradients."""

    chunks: CausalChunks
    times: Tensor | None
    parts: ContractParts | KernelParts

    def groups(self, q: Tensor, k: Tensor, decay: Tensor | None, with_derivative: bool) -> Iterator[Part]:
        """Groups of chunks in order, with their weights: at most as many bytes as the keys, forward and again in backward."""
        chunks, wide = self.chunks, _wide(q)
        room = k.numel() * k.element_size() // wide.itemsize
        if decay is None:
            if chunks.one_per_sample:
                yield Part(chunks, chunks.whole, None, None, None, None)
                return
            counts = PrefixCounts(chunks, wide)
            for group in chunks.groups(room // counts.cell_tensors):
                weights = counts.weights(group)  # for every group: later ones go on from here
                yield Part(chunks, group, weights if group.prefixed else None, None, None, None)
            return
        assert self.times is not None
        state = PrefixDecay(chunks, wide, Decay(decay, self.times), with_derivative)
        if chunks.one_per_sample:
            yield Part(chunks, chunks.whole, None, None, state.bias(chunks.whole), state.ages(chunks.whole))
            return
        for group in chunks.groups(room // (state.cell_tensors * q.shape[1])):
            weights, derivative = state.weights(group)
            yield Part(
                chunks, group, weights if group.prefixed else None, derivative, state.bias(group), state.ages(group)
            )


class _RowGradient:
    """Gradient of rows (U, Hk, D), from groups of chunks: that of a group with all rows as it is, of several summed in float32 or wider."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.total: Tensor | None = None

    def add(self, chunks: CausalChunks, group: Group, inside: Tensor, before: Tensor | None) -> None:
        """inside: per query, of the keys at the group's positions; before: per row."""
        inside = chunks.fold(inside, group)
        if group.size == chunks.num_chunks:
            self.total = inside if before is None else inside + before
            return
        if self.total is None:
            self.total = torch.zeros(self.rows.shape, dtype=_wide(self.rows), device=self.rows.device)
        for found in (inside, before):
            if found is not None:
                self.total[group.rows] += found

    def result(self) -> Tensor:
        assert self.total is not None  # there is an occurrence, so there is a chunk
        return self.total.to(self.rows.dtype)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        q, k, v = (call.parts.rows(x) for x in (q, k, v))
        out = v.new_empty(*q.shape[:2], v.shape[2])
        lse = torch.empty(q.shape[:2], dtype=_wide(q), device=q.device)
        for part in call.groups(q, k, decay, False):
            at = part.group.queries
            call.parts.forward(Rows.of(part, q, k, v), part, out[at], lse[at])
            if part.bias is not None:
                lse[at] -= part.bias
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, decay, *((out, lse) if call.parts.reads_results else ()))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return None, None, None, None, None
        q, k, v, decay, *results = ctx.saved_tensors
        call: _Call = ctx.call
        learned = decay is not None and ctx.needs_input_grad[3]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = _RowGradient(k), _RowGradient(v)
        ddecay = torch.zeros(q.shape[1], dtype=torch.float64, device=q.device) if learned else None
        dout = None if dout is None else call.parts.rows(dout)
        for part in call.groups(q, k, decay, learned):
            group = part.group
            outer = [None if x is None else x[group.queries] for x in (dout, dlse, *results)]
            grads = call.parts.backward(outer, Rows.of(part, q, k, v), part, learned, dq[group.queries])
            dk.add(call.chunks, group, grads.keys, grads.k)
            dv.add(call.chunks, group, grads.values, grads.v)
            if ddecay is not None:
                assert part.ages is not None and grads.bias is not None
                # a query's own term shifts its whole log-sum-exp
                of_bias = grads.bias if outer[1] is None else grads.bias - outer[1]
                ddecay += (of_bias * part.ages[:, None]).sum(0, dtype=torch.float64)
                if grads.weights is not None and part.derivative is not None:
                    ddecay += (grads.weights * part.derivative).sum((0, 1), dtype=torch.float64)
        return dq, dk.result(), dv.result(), None if ddecay is None else ddecay.to(decay.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    times: Tensor | None,
    chunk: int | CausalChunks | None,
) -> None:
    if not isinstance(space, UniqueSpace):
        raise ValueError(f"space is a {type(space).__name__}; pass UniqueSpace.from_packed(tokens, cu_seqlens)")
    for name, x, rows, what in (
        ("q", q, space.num_occurrences, "per occurrence"),
        ("k", k, space.num_rows, "per distinct row"),
        ("v", v, space.num_rows, "per distinct row"),
    ):
        if x.dim() != 3 or x.shape[0] != rows:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; pass ({rows}, heads, head_dim), one row {what}")
    if decay is not None and (decay.shape != (q.shape[1],) or not decay.is_floating_point()):
        raise ValueError(f"decay is {decay.dtype} of shape {tuple(decay.shape)}; pass one per head, ({q.shape[1]},)")
    if times is not None:
        if decay is None:
            raise ValueError("times are given without decay; pass decay too, or neither")
        if times.shape != (space.num_occurrences,):
            raise ValueError(
                f"times have shape {tuple(times.shape)}; pass one per occurrence, ({space.num_occurrences},)"
            )
    if isinstance(chunk, CausalChunks) and chunk.space is not space:
        raise ValueError("chunk was built for another space; pass CausalChunks.of(space, size) or the size")
