"""Sums over the members of a segment, and their transpose: the only two ways data enters and leaves unique space.

Both directions sum in a fixed order (ascending members; on CUDA a tree over them that depends on the segments alone), never
by atomics, so that forward and backward are bitwise repeatable. Kernels: csrc/cpu/segments.cpp,
csrc/rows/segments.cu and logsumexp.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.planning import GROUP
from ta_plugin.ops.registry import Operator


class Segments:
    """A map of M members onto U segments, with its inverse in compressed form.

    index:   (M,) int64, the segment of each member
    order:   (M,) int64, members sorted by segment, ascending within one
    offsets: (U + 1,) int64, where each segment starts in `order`; members from offsets[U] on belong to none, and point anywhere

    Sums over members need order and offsets, and so do gradients. With `counts` (U,) int64 of members in their place they are found when
    they are first read.
    """

    def __init__(
        self,
        index: Tensor,
        order: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        counts: Tensor | None = None,
    ) -> None:
        self.index, self._counts = index, counts
        self._given = None if order is None or offsets is None else (order, offsets)
        if (self._given is None) == (counts is None):
            raise ValueError("segments take order and offsets, or counts; pass one of the two")
        self.num_segments = counts.numel() if counts is not None else offsets.numel() - 1  # type: ignore[union-attr]

    @classmethod
    def found(cls, index: Tensor, grouped: Sequence[Tensor] | None, counts: Tensor) -> Segments:
        """With order and offsets where they were found, else with counts."""
        return cls(index, counts=counts) if grouped is None else cls(index, *grouped)

    @property
    def num_members(self) -> int:
        return self.index.numel()

    @property
    def order(self) -> Tensor:
        return self.grouped[0]

    @property
    def offsets(self) -> Tensor:
        return self.grouped[1]

    @property
    def grouped(self) -> tuple[Tensor, Tensor]:
        """Order and offsets."""
        if self._given is not None:
            return self._given
        found: tuple[Tensor, Tensor] = GROUP(self.index, self._counts)
        # what a graph finds lies in its own memory, and holds nothing before a replay
        if not (self.index.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._given = found
        return found

    def grouped_for(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Order and offsets where a gradient flows to any of the inputs, else None: what only backward reads."""
        flows = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        return self.grouped if flows else (None, None)

    def with_empty(self, more: int) -> Segments:
        """The same with more segments behind the others, without members."""
        if self._given is None and self._counts is not None:
            return Segments(self.index, counts=F.pad(self._counts, (0, more)))
        return Segments(self.index, self.order, F.pad(self.offsets, (0, more), value=self.num_members))

    @classmethod
    def from_index(cls, index: Tensor, num_segments: int) -> Segments:
        """Segments of an index (M,) int64 whose values lie in [0, num_segments)."""
        return cls(index, counts=torch.bincount(index, minlength=num_segments))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the operators take them: index, order, offsets."""
        return self.index, self.order, self.offsets


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of each segment's members: values (M, ...) floating -> (U, ...), same dtype. An empty segment gives 0."""
    _check_rows("values", values, segments.num_members)
    return SEGMENT_SUM(values, *segments.tensors())


def expand(rows: Tensor, segments: Segments) -> Tensor:
    """Each member's segment row: rows (U, ...) floating -> (M, ...), same dtype. The transpose of `segment_sum`."""
    _check_rows("rows", rows, segments.num_segments)
    return EXPAND(rows, segments.index, *segments.grouped_for(rows))


def segment_logsumexp(values: Tensor, segments: Segments) -> Tensor:
    """log of the sum of exponentials of each segment's members: (M, ...) floating -> (U, ...).

    A segment that is empty or all -inf gives -inf and passes gradient 0 (torch.logsumexp gives NaN there).
    """
    _check_rows("values", values, segments.num_members)
    return SEGMENT_LOGSUMEXP(values, *segments.tensors())


def _check_rows(name: str, x: Tensor, expected: int) -> None:
    if x.shape[0] != expected:
        raise ValueError(f"{name} has {x.shape[0]} rows, but the segments have {expected}; pass one row for each")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; pass a floating point tensor")


def _sum_in_torch(values: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    segments = offsets.shape[0] - 1
    if values.numel() == 0 or segments == 0:
        return values.new_zeros(segments, *values.shape[1:])
    flat = values.reshape(values.shape[0], -1)
    # embedding_bag gathers and sums in one pass, each output element by one thread in member order
    ends = F.pad(offsets, (0, 1), value=order.shape[0])  # one bag more, for members of no segment
    summed = F.embedding_bag(order, flat, ends, mode="sum", include_last_offset=True)
    return summed[:segments].reshape(segments, *values.shape[1:])


def _expand_in_torch(rows: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor | None) -> Tensor:
    return rows.index_select(0, index)


def _logsumexp_in_torch(values: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    per_member = [-1, *([1] * (values.dim() - 1))]
    spread = index.view(per_member).expand_as(values)
    of_none = torch.arange(index.shape[0], device=index.device) >= offsets[-1]
    values = values.masked_fill(of_none.view(per_member), -torch.inf)
    peak = values.new_full((offsets.shape[0] - 1, *values.shape[1:]), -torch.inf)
    peak = peak.scatter_reduce(0, spread, values, "amax")  # a maximum does not depend on order
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    return shift + _sum_in_torch((values - shift.index_select(0, index)).exp(), index, order, offsets).log()


def _segments_like(values: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, *values.shape[1:])


def _members_like(rows: Tensor, index: Tensor, order: Tensor | None, offsets: Tensor | None) -> Tensor:
    return rows.new_empty(index.shape[0], *rows.shape[1:])


def _keep_segments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return EXPAND(grad, *ctx.saved_tensors), None, None, None


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return SEGMENT_SUM(grad, *ctx.saved_tensors), None, None, None


def _logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    values, *segments, lse = ctx.saved_tensors
    safe = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf - 0) = 0 for every member of such a segment
    return EXPAND(grad, *segments) * (values - EXPAND(safe, *segments)).exp(), None, None, None


_SEGMENTS = "Tensor index, Tensor order, Tensor offsets) -> Tensor"
SEGMENT_SUM = Operator(
    "segment_sum", f"(Tensor values, {_SEGMENTS}", _sum_in_torch, _segments_like, _keep_segments, _sum_backward
)
EXPAND = Operator(
    # order and offsets are backward's: None where none will run
    "expand",
    "(Tensor rows, Tensor index, Tensor? order, Tensor? offsets) -> Tensor",
    _expand_in_torch,
    _members_like,
    _keep_segments,
    _expand_backward,
)
SEGMENT_LOGSUMEXP = Operator(
    "segment_logsumexp",
    f"(Tensor values, {_SEGMENTS}",
    _logsumexp_in_torch,
    _segments_like,
    _keep_values,
    _logsumexp_backward,
)
