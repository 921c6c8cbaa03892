"""Averaging the gradients of replicated parameters, for training loops without a data-parallel engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin.parallel.groups import SSPGroup


def average_gradients(parameters: Iterable[Tensor], group: SSPGroup) -> None:
    """Replace each parameter's gradient by its mean over all SSP ranks and replicas, in one flat all-reduce per dtype.

    A parameter without a gradient counts as 0, so that every rank reduces the same buffers.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in grads])
        for over, size in ((group.group, group.size), (group.replicas, group.num_replicas)):
            if over is not None and size > 1:
                dist.all_reduce(flat, group=over)
                group.traffic.record("dense.grad", flat, 2 * (size - 1) * flat.numel() // size)  # a ring's share
        flat /= group.data_parallel_size
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()
