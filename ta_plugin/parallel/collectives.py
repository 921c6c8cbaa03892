"""Collectives over rows with a backward: each one's gradient is its transpose, run in the same order on every rank.

Sums over ranks are taken in rank order after an all-to-all, so that results repeat bit for bit; backends that reduce
inside the collective do not promise that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def gather_single(gathered: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Equal parts x of every rank into `gathered`, by the name this torch has for it (renamed in 2.13)."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(gathered, x, group=group)


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


def _exchange(x: Tensor, send: list[int], receive: list[int], group: SSPGroup, name: str) -> Tensor:
    received = x.new_empty(sum(receive), *x.shape[1:])
    with explained(name, group):
        dist.all_to_all_single(received, x.contiguous(), receive, send, group=group.group)
    group.traffic.record(name, x, sum(send) - send[group.rank])
    return received


def _gather(x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
    if min(rows) == max(rows):
        gathered = x.new_empty(sum(rows), *x.shape[1:])
        with explained(name, group):
            gather_single(gathered, x.contiguous(), group.group)
        group.traffic.record(name, x, (group.size - 1) * x.shape[0])
        return gathered
    # uneven: an all-to-all that sends the same rows to everybody moves no padding
    everyone = x.repeat(group.size, *([1] * (x.dim() - 1)))
    return _exchange(everyone, [x.shape[0]] * group.size, rows, group, name)


def _scatter_sum(x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
    mine = rows[group.rank]
    return _exchange(x, rows, [mine] * group.size, group, name).view(group.size, mine, *x.shape[1:]).sum(0)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: SSPGroup, name: str) -> Tensor:
        ctx.transpose = (receive, send, group, name + ".grad")
        return _exchange(x, send, receive, group, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _AllToAll.apply(grad, *ctx.transpose), None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: SSPGroup, name: str) -> Tensor:
        ctx.transpose = (rows, group, name + ".grad")
        return _gather(x, rows, group, name)

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
