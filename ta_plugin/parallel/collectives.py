"""Collectives over rows with a backward: each one's gradient is its transpose, run in the same order on every rank.

Sums over ranks are taken in rank order after an all-to-all, so that results repeat bit for bit; backends that reduce
inside the collective do not promise that.

What `start_...` begins runs beside what the caller computes until `arrive`, and its gradient's way back beside what ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ta_plugin.parallel.groups import SSPGroup


def all_to_all_rows(x: Tensor, send: Sequence[int], receive: Sequence[int], group: SSPGroup, name: str) -> Tensor:
    """Send x's rows (sum(send), ...), `send[r]` of them to rank r in order; returns (sum(receive), ...) in rank order.

    `name` is what the traffic is counted under (the gradient under "<name>.grad").
    """
    if group.size == 1:
        return x
    return _AllToAll.apply(x, list(send), list(receive), group, name)


def all_gather_rows(x: Tensor, rows: Sequence[int], group: SSPGroup, name: str) -> Tensor:
    """Rows of every rank in rank order: x (rows[rank], ...) -> (sum(rows), ...). Backward sums over ranks."""
    if group.size == 1:
        return x
    return _AllGather.apply(x, list(rows), group, name)


def reduce_scatter_rows(x: Tensor, rows: Sequence[int], group: SSPGroup, name: str) -> Tensor:
    """Sum over ranks of x (sum(rows), ...), of which rank r keeps its `rows[r]`: -> (rows[rank], ...)."""
    if group.size == 1:
        return x
    return _ReduceScatter.apply(x, list(rows), group, name)


class Moving:
    """Rows on their way: a collective that has started, and is waited for where its rows are used, forward and backward.

    Two autograd nodes, as in `Hop`: autograd runs nodes in the reverse order of their creation, so that backward the node of `arrive`
    starts the way back, what the caller computed in between runs backward, and the first node waits. Gradients of first order only.
    """

    def __init__(
        self, x: Tensor, there: Callable[[Tensor], InFlight], back: Callable[[Tensor], InFlight], parts: int = 1
    ) -> None:
        """`parts`: how many gradients of x come back, to be added up."""
        self._there, self._back, self._parts = there, back, parts
        self._flight: InFlight | None = None
        self._anchor: Tensor | None = _Depart.apply(self, x)

    def arrive(self) -> Tensor:
        """The rows, once they are here; to be called once."""
        anchor, self._anchor = self._anchor, None  # kept, it would keep the graph that keeps it
        rows: Tensor = _Arrive.apply(self, anchor)
        return rows

    def _landed(self) -> Tensor:
        flight, self._flight = self._flight, None
        assert flight is not None
        return flight.wait()


class Arrived:
    """Rows that had no way to go, in place of `Moving`."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def arrive(self) -> Tensor:
        return self._rows


def start_all_to_all_rows(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: SSPGroup, name: str
) -> Moving | Arrived:
    """`all_to_all_rows`, whose rows `arrive` returns."""
    if group.size == 1:
        return Arrived(x)
    out, back = list(send), list(receive)
    return Moving(
        x,
        lambda rows: _exchange(rows, out, back, group, name, later=True),
        lambda grad: _exchange(grad, back, out, group, name + ".grad", later=True),
    )


def start_all_gather_rows(x: Tensor, rows: Sequence[int], group: SSPGroup, name: str) -> Moving | Arrived:
    """`all_gather_rows`, whose rows `arrive` returns."""
    if group.size == 1:
        return Arrived(x)
    counts, mine = list(rows), [rows[group.rank]] * group.size
    return Moving(
        x,
        lambda part: _gather(part, counts, group, name, later=True),
        lambda grad: _exchange(grad, counts, mine, group, name + ".grad", later=True),
        group.size,
    )


def gather_single(
    gathered: Tensor, x: Tensor, group: dist.ProcessGroup | None, later: bool = False
) -> dist.Work | None:
    """Equal parts x of every rank into `gathered`, by the name this torch has for it (renamed in 2.13)."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    work: dist.Work | None = gather(gathered, x, group=group, async_op=later)
    return work


@contextmanager
def explained(name: str, group: SSPGroup) -> Iterator[None]:
    """Around a collective: what fails in it gets a note on what the other ranks may have done instead."""
    try:
        yield
    except RuntimeError as error:  # a time-out, or a peer that is gone
        error.add_note(
            f"in {name!r}, which all ranks of {group} must reach: one of them raised an error of its own (an embedding_fn or a module "
            "between look-up and attention), calls other modules, has fewer batches, or built TokenizedAttention with nranks=1"
        )
        raise


@dataclass(frozen=True)
class InFlight:
    """A collective that runs: what it fills, what it reads, and the work to wait for, None if that was waited for."""

    received: Tensor
    sent: Tensor
    work: dist.Work | None
    group: SSPGroup
    name: str

    def wait(self) -> Tensor:
        if self.work is not None:
            with explained(self.name, self.group):
                self.work.wait()
        return self.received


def _exchange(
    x: Tensor, send: list[int], receive: list[int], group: SSPGroup, name: str, later: bool = False
) -> InFlight:
    sent, received = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
    with explained(name, group):
        work = dist.all_to_all_single(received, sent, receive, send, group=group.group, async_op=later)
    group.traffic.record(name, x, sum(send) - send[group.rank])
    return InFlight(received, sent, work, group, name)


def _gather(x: Tensor, rows: list[int], group: SSPGroup, name: str, later: bool = False) -> InFlight:
    if min(rows) == max(rows):
        sent, gathered = x.contiguous(), x.new_empty(sum(rows), *x.shape[1:])
        with explained(name, group):
            work = gather_single(gathered, sent, group.group, later)
        group.traffic.record(name, x, (group.size - 1) * x.shape[0])
        return InFlight(gathered, sent, work, group, name)
    # uneven: an all-to-all that sends the same rows to everybody moves no padding
    everyone = x.repeat(group.size, *([1] * (x.dim() - 1)))
    return _exchange(everyone, [x.shape[0]] * group.size, rows, group, name, later)


def _sum_of_parts(rows: Tensor, parts: int) -> Tensor:
    """In order."""
    return rows.view(parts, rows.shape[0] // parts, *rows.shape[1:]).sum(0)


def _scatter_sum(x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
    parts = _exchange(x, rows, [rows[group.rank]] * group.size, group, name).wait()
    return _sum_of_parts(parts, group.size)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moving: Moving, x: Tensor) -> Tensor:
        ctx.moving = moving
        moving._flight = moving._there(x)
        return x.new_empty(0)  # ties the two nodes together; what counts travels in `moving`

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[None, Tensor]:
        returned, parts = ctx.moving._landed(), ctx.moving._parts
        return None, returned if parts == 1 else _sum_of_parts(returned, parts)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moving: Moving, anchor: Tensor) -> Tensor:
        ctx.moving = moving
        return moving._landed()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.moving._flight = ctx.moving._back(grad)
        return None, grad.new_empty(0)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: SSPGroup, name: str) -> Tensor:
        ctx.transpose = (receive, send, group, name + ".grad")
        return _exchange(x, send, receive, group, name).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _AllToAll.apply(grad, *ctx.transpose), None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
        ctx.transpose = (rows, group, name + ".grad")
        return _gather(x, rows, group, name).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _ReduceScatter.apply(grad, *ctx.transpose), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
        ctx.transpose = (rows, group, name + ".grad")
        return _scatter_sum(x, rows, group, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllGather.apply(grad, *ctx.transpose), None, None, None
