"""Buckets: what goes to each rank in equal, fixed sizes, several tensors in one collective. Nothing about them is the host's to know.

Two autograd nodes, as in `collectives.Moving`: what runs between the start and `arrive` runs beside the collective, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ta_plugin.parallel.collectives import InFlight, explained
from ta_plugin.parallel.groups import SSPGroup

_ALIGNED = 16  # bytes: every dtype's view of a part begins where it may


@dataclass(frozen=True)
class Blank:
    """A part of a shape (N, ...) that is written where it is sent from; passes no gradient."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def requires_grad(self) -> bool:
        return False


class Buckets:
    """Tensors (N, ...) on their way: part r of each goes to rank r, all of them in one all-to-all.

    Every rank starts the same ones in one order, of the same shapes and dtypes. Gradients return together too, of first order only.
    Traffic is counted as `name` and "<name>.grad", in bytes.

    fill: takes the parts that are blank, in order, and writes them
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | Blank],
        group: SSPGroup,
        name: str,
        fill: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self._group, self._name, self._fill = group, name, fill
        self.wanted = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
        self._flight: tuple[InFlight, _Layout] | None = None
        self._anchor: Tensor | None = _Depart.apply(self, *tensors)

    def arrive(self) -> tuple[Tensor, ...]:
        """The tensors, part r of each from rank r, once they are here; to be called once."""
        anchor, self._anchor = self._anchor, None  # kept, it would keep the graph that keeps it
        parts: tuple[Tensor, ...] = _Arrive.apply(self, anchor)
        return parts

    def post(self, tensors: Sequence[Tensor | Blank], name: str) -> None:
        """Start exchanging."""
        layout, group = _Layout.of(tensors), self._group
        sent = torch.empty(group.size, layout.width, dtype=torch.uint8, device=group.device)
        blank = []
        for x, part in zip(tensors, layout.unpack(sent), strict=True):
            if isinstance(x, Blank):
                blank.append(part)
            else:
                part.copy_(x)
        if blank and self._fill is not None:
            self._fill(blank)
            self._fill = None  # with what it holds
        received = torch.empty_like(sent)
        with explained(name, group):
            work = dist.all_to_all_single(received, sent, group=group.group, async_op=True)
        group.traffic.record(name, sent, group.size - 1)
        self._flight = InFlight(received, sent, work, group, name), layout

    def landed(self) -> tuple[Tensor, ...]:
        """What was posted, once it is here."""
        flight, self._flight = self._flight, None
        assert flight is not None
        return flight[1].unpack(flight[0].wait())


@dataclass(frozen=True)
class _Layout:
    """Where the parts of each rank's bucket lie in it: shapes (N, ...), dtypes, offsets in bytes, and the bucket's bytes."""

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    offsets: list[int]
    width: int

    @classmethod
    def of(cls, tensors: Sequence[Tensor | Blank]) -> _Layout:
        offsets, end = [], 0
        for x in tensors:
            offsets.append(end)
            size = math.prod(x.shape[1:]) * x.dtype.itemsize
            end += -(-size // _ALIGNED) * _ALIGNED
        return cls([x.shape for x in tensors], [x.dtype for x in tensors], offsets, max(end, _ALIGNED))

    def unpack(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Views."""
        return tuple(
            buffer[:, begin : begin + math.prod(shape[1:]) * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, begin in zip(self.shapes, self.dtypes, self.offsets, strict=True)
        )


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buckets: Buckets, *tensors: Tensor | Blank) -> Tensor:
        ctx.buckets = buckets
        buckets.post(tensors, buckets._name)
        return torch.empty(
            0, device=buckets._group.device
        )  # ties the two nodes together; what counts travels in `buckets`

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        returned = iter(ctx.buckets.landed())
        return None, *(next(returned) if wanted else None for wanted in ctx.buckets.wanted)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buckets: Buckets, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.buckets = buckets
        parts = buckets.landed()
        ctx.mark_non_differentiable(*(x for x in parts if not x.is_floating_point()))
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        buckets = ctx.buckets
        buckets.post([g for g, wanted in zip(grads, buckets.wanted, strict=True) if wanted], buckets._name + ".grad")
        return None, grads[0].new_empty(0, dtype=torch.float32)
