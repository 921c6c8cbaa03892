"""One hop around the ring of a group, in flight while the caller computes, forward and backward.

A hop is two autograd nodes. Forward, `Hop` posts sends and receives, the caller computes, and `arrive` waits. Autograd runs
nodes in the reverse order of their creation, so backward the node of `arrive` posts the gradients' way back, what the caller
computed in between runs backward, and the node of `Hop` waits: the same overlap, without a thread or a stream of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ta_plugin.parallel.groups import SSPGroup


class Hop:
    """Sends tensors (rows, ...) to the next rank of the group and receives `rows_arriving` rows of each from the rank before.

    Every rank makes the same hops in one order; what has no rows is not sent. `names` are what the traffic of each tensor is
    counted under (gradients under "<name>.grad").
    """

    def __init__(self, tensors: Sequence[Tensor], rows_arriving: int, group: SSPGroup, names: Sequence[str]) -> None:
        self._group, self._names, self._rows = group, list(names), rows_arriving
        self._works: list[dist.Work] = []
        self._sent: list[Tensor] = []  # kept until they have left
        self._returned: list[Tensor] = []
        self._buffers: tuple[Tensor, ...] = _Depart.apply(self, *tensors)

    def arrive(self) -> tuple[Tensor, ...]:
        """The tensors of the rank before, (rows_arriving, ...), once they are here."""
        buffers, self._buffers = self._buffers, ()  # a hop that kept them would keep the graph that keeps the hop
        return _Arrive.apply(self, *buffers)

    def post(self, tensors: Sequence[Tensor], rows: int, step: int, names: Sequence[str]) -> list[Tensor]:
        """Start exchanging: to the rank `step` ahead, from the rank `step` behind."""
        group = self._group
        to, source = (group.rank + step) % group.size, (group.rank - step) % group.size
        self._sent = [x.contiguous() for x in tensors]
        buffers = [x.new_empty(rows, *x.shape[1:]) for x in tensors]
        operations = []
        for tag, (x, buffer, name) in enumerate(zip(self._sent, buffers, names, strict=True)):
            if x.numel():
                operations.append(dist.P2POp(dist.isend, x, group=group.group, tag=tag, group_peer=to))
            if buffer.numel():
                operations.append(dist.P2POp(dist.irecv, buffer, group=group.group, tag=tag, group_peer=source))
            group.traffic.record(name, x, x.shape[0])
        self._works = dist.batch_isend_irecv(operations) if operations else []
        return buffers

    def wait(self) -> None:
        """Until what was posted has left and arrived."""
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hop: Hop, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.hop = hop
        return tuple(hop.post(tensors, hop._rows, 1, hop._names))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.hop.wait()
        returned, ctx.hop._returned = ctx.hop._returned, []
        return None, *returned


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hop: Hop, *buffers: Tensor) -> tuple[Tensor, ...]:
        ctx.hop, ctx.rows = hop, hop._sent[0].shape[0]
        hop.wait()
        return tuple(x.view_as(x) for x in buffers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hop = ctx.hop
        hop._returned = hop.post(grads, ctx.rows, -1, [f"{name}.grad" for name in hop._names])
        return None, *grads  # of the buffers' shapes, as autograd wants them; what counts travels in the hop
