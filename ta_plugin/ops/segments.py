"""Sums over the members of a segment, and their transpose: the only two ways data enters and leaves unique space.

Both directions sum in a fixed order (segment members in ascending index), never by atomics, so that forward and
backward are bitwise repeatable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """A map of M members onto U segments, with its inverse in compressed form.

    index:   (M,) int64, the segment of each member
    order:   (M,) int64, members sorted by segment, ascending within one
    offsets: (U + 1,) int64, where each segment starts in `order`
    """

    index: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def num_members(self) -> int:
        return self.index.numel()

    @property
    def num_segments(self) -> int:
        return self.offsets.numel() - 1

    @classmethod
    def from_index(cls, index: Tensor, num_segments: int) -> Segments:
        """Segments of an index (M,) int64 whose values lie in [0, num_segments)."""
        offsets = index.new_zeros(num_segments + 1)
        torch.cumsum(torch.bincount(index, minlength=num_segments), 0, out=offsets[1:])
        return cls(index, torch.argsort(index, stable=True), offsets)


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of each segment's members: values (M, ...) floating -> (U, ...), same dtype. An empty segment gives 0."""
    _check_rows("values", values, segments.num_members)
    return _SegmentSum.apply(values, segments)


def expand(rows: Tensor, segments: Segments) -> Tensor:
    """Each member's segment row: rows (U, ...) floating -> (M, ...), same dtype. The transpose of `segment_sum`."""
    _check_rows("rows", rows, segments.num_segments)
    return _Expand.apply(rows, segments)


def segment_logsumexp(values: Tensor, segments: Segments) -> Tensor:
    """log of the sum of exponentials of each segment's members: (M, ...) floating -> (U, ...).

    A segment that is empty or all -inf gives -inf and passes gradient 0 (torch.logsumexp gives NaN there).
    """
    _check_rows("values", values, segments.num_members)
    return _SegmentLogSumExp.apply(values, segments)


def _check_rows(name: str, x: Tensor, expected: int) -> None:
    if x.shape[0] != expected:
        raise ValueError(f"{name} has {x.shape[0]} rows, but the segments have {expected}; pass one row for each")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; pass a floating point tensor")


def _sum_members(values: Tensor, segments: Segments) -> Tensor:
    if values.numel() == 0 or segments.num_segments == 0:
        return values.new_zeros(segments.num_segments, *values.shape[1:])
    flat = values.reshape(values.shape[0], -1)
    # embedding_bag gathers and sums in one pass, each output element by one thread in member order
    summed = F.embedding_bag(segments.order, flat, segments.offsets, mode="sum", include_last_offset=True)
    return summed.reshape(segments.num_segments, *values.shape[1:])


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _sum_members(values, segments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Expand.apply(grad, ctx.segments), None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return rows.index_select(0, segments.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SegmentSum.apply(grad, ctx.segments), None


class _SegmentLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        index = segments.index.view(-1, *([1] * (values.dim() - 1))).expand_as(values)
        peak = values.new_full((segments.num_segments, *values.shape[1:]), -torch.inf)
        peak = peak.scatter_reduce(0, index, values, "amax")  # a maximum does not depend on order
        shift = peak.masked_fill(peak == -torch.inf, 0.0)
        lse = shift + _sum_members((values - shift.index_select(0, segments.index)).exp(), segments).log()
        ctx.segments = segments
        ctx.save_for_backward(values, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, lse = ctx.saved_tensors
        safe = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf - 0) = 0 for every member of such a segment
        share = (values - _Expand.apply(safe, ctx.segments)).exp()
        return _Expand.apply(grad, ctx.segments) * share, None
