"""Buckets of fixed sizes, as operators: items written to them, and what arrived in them, brought together.

Kernels: csrc/cpu/buckets.cpp and csrc/plan/buckets.cu. `compact` and `spread` are each other's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.planning import PARTITION
from ta_plugin.ops.registry import Operator


def _bucket_in_torch(
    owner: Tensor, cu_seqlens: Tensor, values: list[Tensor], buckets: list[Tensor], sizes: Tensor, most: Tensor
) -> None:
    """Write each of values (n,) to its item's place in buckets (N, C), sizes (N, B) and most (1,) int64; see `BoundedRoute`.

    owner (n,) int64, n > 0, and bounds (B + 1,) int32. Places without an item hold another one's. Buckets of int32 take int64 values, -1
    where these are negative or too large.
    """
    n, device = owner.numel(), owner.device
    ranks, bound = buckets[0].shape
    goes = (torch.arange(n, device=device) < cu_seqlens[-1]) & (owner >= 0) & (owner < ranks)
    # the others as items of one more rank, and of one more sample
    bounds = F.pad(cu_seqlens.long(), (0, 1), value=n)
    order, counts = PARTITION.in_torch(torch.where(goes, owner, ranks), bounds, ranks + 1)
    counts = counts[:ranks, :-1]
    sent = counts.sum(1, keepdim=True)
    most.copy_(sent.amax(0))
    sizes.copy_(counts * (most <= bound))
    place = torch.arange(bound, device=device)
    at = torch.where(place < sent, sent.cumsum(0) - sent + place, 0)
    take = torch.where(place < sent, order[at], place % n)
    for each, bucket in zip(values, buckets, strict=True):
        taken = each[take]
        if bucket.dtype != each.dtype:
            taken = torch.where((taken >= 0) & (taken <= torch.iinfo(bucket.dtype).max), taken, -1)
        bucket.copy_(taken)


def _bounds_in_torch(sizes: Tensor) -> Tensor:
    """(n + 1,) int32: where each of n parts begins, and the end, from their sizes (n,) or (ranks, samples) int64."""
    bounds = torch.zeros(sizes.numel() + 1, dtype=torch.int32, device=sizes.device)
    torch.cumsum(sizes.reshape(-1), 0, out=bounds[1:])
    return bounds


def _compact_in_torch(buckets: Tensor, cu_seqlens: Tensor, widen: bool = False) -> Tensor:
    """(N, C, ...) -> (N * C, ...): rows [begin_r, begin_r+1) are the first of bucket r, with bounds (N * B + 1,) int32; then zeros.

    widen: int32 buckets (N, C) become int64.
    """
    ranks, bound = buckets.shape[:2]
    begins = _begins(cu_seqlens, ranks)
    place = torch.arange(ranks * bound, device=buckets.device)
    rank = torch.bucketize(place, begins[1:-1], right=True)
    there = place < begins[-1]
    source = torch.where(there, place - begins[rank] + rank * bound, 0)
    together = rows_where(there, buckets.flatten(0, 1).index_select(0, source))
    return together.long() if widen else together


def _spread_in_torch(together: Tensor, cu_seqlens: Tensor, ranks: int) -> Tensor:
    """The transpose: (N * C, ...) -> (N, C, ...)."""
    bound = together.shape[0] // ranks
    begins = _begins(cu_seqlens, ranks)
    place = torch.arange(bound, device=together.device)
    there = place < begins.diff()[:, None]
    source = torch.where(there, begins[:-1, None] + place, 0).view(-1)
    return rows_where(there.view(-1), together.index_select(0, source)).unflatten(0, (ranks, bound))


def _begins(cu_seqlens: Tensor, ranks: int) -> Tensor:
    """Where the rows of each rank begin, and the end, (N + 1,) int64."""
    samples = (cu_seqlens.numel() - 1) // ranks
    return cu_seqlens[::samples].long() if samples else cu_seqlens.new_zeros(ranks + 1, dtype=torch.int64)


def rows_where(there: Tensor, rows: Tensor) -> Tensor:
    """Rows (n, ...) where `there` (n,), else 0."""
    return torch.where(there.view(-1, *([1] * (rows.dim() - 1))), rows, 0)


def _compact_like(buckets: Tensor, cu_seqlens: Tensor, widen: bool = False) -> Tensor:
    dtype = torch.int64 if widen else buckets.dtype
    return buckets.new_empty(buckets.shape[0] * buckets.shape[1], *buckets.shape[2:], dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.ranks = inputs[0].shape[0]


def _compact_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return SPREAD(grad, *ctx.saved_tensors, ctx.ranks), None, None


BUCKET = Operator(
    "bucket",
    "(Tensor owner, Tensor cu_seqlens, Tensor[] values, Tensor(a!)[] buckets, Tensor(b!) sizes, Tensor(c!) most) -> ()",
    _bucket_in_torch,
    lambda owner, cu_seqlens, values, buckets, sizes, most: None,
)
BOUNDS = Operator(
    "bounds",
    "(Tensor sizes) -> Tensor",
    _bounds_in_torch,
    lambda sizes: sizes.new_empty(sizes.numel() + 1, dtype=torch.int32),
)
COMPACT = Operator(
    "compact",
    "(Tensor buckets, Tensor cu_seqlens, bool widen=False) -> Tensor",
    _compact_in_torch,
    _compact_like,
    _keep,
    _compact_backward,
)
SPREAD = Operator(
    "spread",
    "(Tensor together, Tensor cu_seqlens, int ranks) -> Tensor",
    _spread_in_torch,
    lambda together, cu_seqlens, ranks: together.new_empty(ranks, together.shape[0] // ranks, *together.shape[1:]),
)
