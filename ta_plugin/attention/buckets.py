"""Ragged samples as a few padded batches: how dense kernels see packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ta_plugin.ops.connect import connect


@dataclass(frozen=True)
class CallCost:
    """What batching trades, in query-key pairs: one more kernel call, against copying one row into padding."""

    call: int
    row_copy: int


CPU_COST = CallCost(call=1 << 13, row_copy=30)
CUDA_COST = CallCost(call=1 << 22, row_copy=64)


@dataclass(frozen=True)
class Side:
    """One side (queries or keys) of a bucket: n samples of up to `length` rows."""

    num_samples: int
    length: int
    num_rows: int
    slots: Tensor | None  # (num_rows,) slot of each row in the (n * length) grid; None when there is no padding
    device: torch.device

    def pad(self, rows: Tensor) -> Tensor:
        """(num_rows, ...) -> (n, length, ...), zeros in the padding."""
        if self.slots is None:
            return rows.reshape(self.num_samples, self.length, *rows.shape[1:])
        grid = rows.new_zeros(self.num_samples * self.length, *rows.shape[1:])
        return grid.index_copy(0, self.slots, rows).reshape(self.num_samples, self.length, *rows.shape[1:])

    def unpad(self, grid: Tensor) -> Tensor:
        """(n, length, ...) -> (num_rows, ...)."""
        flat = grid.reshape(self.num_samples * self.length, *grid.shape[2:])
        return flat if self.slots is None else flat.index_select(0, self.slots)

    def valid(self) -> Tensor:
        """(n, length) bool, True on rows."""
        mask = torch.zeros(self.num_samples * self.length, dtype=torch.bool, device=self.device)
        return (mask.logical_not() if self.slots is None else mask.index_fill(0, self.slots, True)).view(
            self.num_samples, self.length
        )


@dataclass(frozen=True)
class Buckets:
    """Packed rows regrouped so that each bucket's samples follow each other; samples without queries or keys are left out.

    q_order, k_order: packed rows in bucket order, or None where that is the order they have
    """

    sides: list[tuple[Side, Side]]
    q_order: Tensor | None
    k_order: Tensor | None
    num_queries: int

    def split_q(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Packed per-query rows (Q, ...) to one piece per bucket."""
        return _split(rows, self.q_order, [q.num_rows for q, _ in self.sides])

    def split_k(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Packed per-key rows (K, ...) to one piece per bucket."""
        return _split(rows, self.k_order, [k.num_rows for _, k in self.sides])

    def join_q(self, pieces: list[Tensor], fill: float) -> Tensor:
        """One piece per bucket back to packed rows (Q, ...); queries without any key get `fill`."""
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.q_order is None:
            return joined
        return joined.new_full((self.num_queries, *joined.shape[1:]), fill).index_copy(0, self.q_order, joined)


@dataclass(frozen=True)
class Piece:
    """One bucket of a call, padded: q (n, Tq, H, D), k (n, Tk, Hk, D), v (n, Tk, Hk, Dv), weight (n, Tk, ...), chunk (n, Tq)."""

    q_side: Side
    k_side: Side
    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor | None
    chunk: Tensor | None


def padded_pieces(
    buckets: Buckets, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, q_chunk: Tensor | None = None
) -> Iterator[Piece]:
    """Packed rows, `weight` (K, ...) and `q_chunk` (Q,), bucket by bucket."""
    nothing: list[None] = [None] * len(buckets.sides)
    split = zip(
        buckets.sides,
        buckets.split_q(q),
        buckets.split_k(k),
        buckets.split_k(v),
        nothing if weight is None else buckets.split_k(weight),
        nothing if q_chunk is None else buckets.split_q(q_chunk),
        strict=True,
    )
    for (q_side, k_side), qs, ks, vs, ws, chunk in split:
        yield Piece(
            q_side,
            k_side,
            q_side.pad(qs),
            k_side.pad(ks),
            k_side.pad(vs),
            None if ws is None else k_side.pad(ws),
            None if chunk is None else q_side.pad(chunk),
        )


def nothing_seen(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """What queries get when no sample has both queries and keys: out (Q, H, Dv) of 0, lse (Q, H) of -inf, gradients 0."""
    out = v.new_zeros(*q.shape[:2], v.shape[2])
    wide = torch.promote_types(v.dtype, torch.float32)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    return connect(out, q, k, v, weight), connect(lse, q, k, v, weight)


def bucketize(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Buckets:
    """Group samples, given their bounds (B + 1,), so that padding and copies cost less than the calls they save."""
    device = cu_seqlens_q.device
    cost = CUDA_COST if device.type == "cuda" else CPU_COST
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [
        (b, q1 - q0, k1 - k0) for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False))
    ]
    live = [sample for sample in lengths if sample[1] and sample[2]]
    groups = [live] if live and _uniform(live) else _group(sorted(live, key=lambda s: (-s[2], -s[1])), cost)
    if all(len(group) == 1 for group in groups):
        groups.sort(key=lambda group: group[0][0])  # nothing to bring together: leave every row where it lies
    sides = [(_side([s[1] for s in group], device), _side([s[2] for s in group], device)) for group in groups]
    members = [s[0] for group in groups for s in group]
    return Buckets(sides, _order(members, cu_q, device), _order(members, cu_k, device), cu_q[-1])


def _uniform(samples: list[tuple[int, int, int]]) -> bool:
    return all(s[1:] == samples[0][1:] for s in samples)


def _group(samples: list[tuple[int, int, int]], cost: CallCost) -> list[list[tuple[int, int, int]]]:
    """Greedy over samples sorted by length: a sample joins while that is cheaper than a call of its own."""
    groups: list[list[tuple[int, int, int]]] = []
    q_max = k_max = 0
    for sample in samples:
        _, q, k = sample
        if groups:
            group, widest = groups[-1], max(q_max, q)
            grown = (len(group) + 1) * widest * k_max - len(group) * q_max * k_max - q * k
            copied = cost.row_copy * (q + k + (sum(group[0][1:]) if len(group) == 1 else 0))
            if grown + copied <= cost.call:
                group.append(sample)
                q_max = widest
                continue
        groups.append([sample])
        q_max, k_max = q, k
    return groups


def _side(lengths: list[int], device: torch.device) -> Side:
    longest = max(lengths)
    if min(lengths) == longest:
        return Side(len(lengths), longest, len(lengths) * longest, None, device)
    sizes = torch.tensor(lengths)
    slots = (torch.arange(longest) < sizes[:, None]).view(-1).nonzero().squeeze(1)
    return Side(len(lengths), longest, slots.numel(), slots.to(device), device)


def _order(samples: list[int], cu: list[int], device: torch.device) -> Tensor | None:
    if all(a < b for a, b in pairwise(samples)):
        dropped = cu[-1] - sum(cu[b + 1] - cu[b] for b in samples)
        if dropped == 0:
            return None
    rows = [torch.arange(cu[b], cu[b + 1]) for b in samples]
    return (torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)).to(device)


def _split(rows: Tensor, order: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...]:
    ordered = rows if order is None else rows.index_select(0, order)
    return ordered.split(sizes)  # one copy for all buckets: its backward is one concatenation
