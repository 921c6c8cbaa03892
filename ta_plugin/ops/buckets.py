"""Buckets of fixed sizes, as operators: where items go in them, and what arrived in them, brought together.

Kernels: csrc/cpu/buckets.cpp and csrc/plan/buckets.cu. `compact` and `spread` are each other's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.planning import PARTITION
from ta_plugin.ops.registry import Operator


def _bucket_in_torch(owner: Tensor, cu_seqlens: Tensor, ranks: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    """owner (n,) int64, n > 0, and bounds (B + 1,) int32 -> take (N, C), sizes (N, B), most (1,), all int64; see `BoundedRoute`."""
    n, device = owner.numel(), owner.device
    goes = (torch.arange(n, device=device) < cu_seqlens[-1]) & (owner >= 0) & (owner < ranks)
    # the others as items of one more rank, and of one more sample
    bounds = F.pad(cu_seqlens.long(), (0, 1), value=n)
    order, sizes = PARTITION.in_torch(torch.where(goes, owner, ranks), bounds, ranks + 1)
    sizes = sizes[:ranks, :-1]
    sent = sizes.sum(1, keepdim=True)
    most = sent.amax(0)
    place = torch.arange(bound, device=device)
    at = torch.where(place < sent, sent.cumsum(0) - sent + place, 0)
    return torch.where(place < sent, order[at], place % n), sizes * (most <= bound), most


def _compact_in_torch(buckets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N, C, ...) -> (N * C, ...): rows [begin_r, begin_r+1) are the first of bucket r, with bounds (N * B + 1,) int32; then zeros."""
    ranks, bound = buckets.shape[:2]
    begins = _begins(cu_seqlens, ranks)
    place = torch.arange(ranks * bound, device=buckets.device)
    rank = torch.bucketize(place, begins[1:-1], right=True)
    there = place < begins[-1]
    source = torch.where(there, place - begins[rank] + rank * bound, 0)
    return rows_where(there, buckets.flatten(0, 1).index_select(0, source))


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


def _bucket_like(owner: Tensor, cu_seqlens: Tensor, ranks: int, bound: int) -> tuple[Tensor, Tensor, Tensor]:
    return owner.new_empty(ranks, bound), owner.new_empty(ranks, cu_seqlens.shape[0] - 1), owner.new_empty(1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.ranks = inputs[0].shape[0]


def _compact_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return SPREAD(grad, *ctx.saved_tensors, ctx.ranks), None


BUCKET = Operator(
    "bucket",
    "(Tensor owner, Tensor cu_seqlens, int ranks, int bound) -> (Tensor, Tensor, Tensor)",
    _bucket_in_torch,
    _bucket_like,
)
COMPACT = Operator(
    "compact",
    "(Tensor buckets, Tensor cu_seqlens) -> Tensor",
    _compact_in_torch,
    lambda buckets, cu_seqlens: buckets.new_empty(buckets.shape[0] * buckets.shape[1], *buckets.shape[2:]),
    _keep,
    _compact_backward,
)
SPREAD = Operator(
    "spread",
    "(Tensor together, Tensor cu_seqlens, int ranks) -> Tensor",
    _spread_in_torch,
    lambda together, cu_seqlens, ranks: together.new_empty(ranks, together.shape[0] // ranks, *together.shape[1:]),
)
