"""Reduction and clipping of gradients without Megatron's DDP and optimizer, which need CUDA: what a CPU run uses.

Pipeline parallelism is not covered: its schedules need CUDA too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], groups: ProcessGroupCollection) -> None:
    """Average gradients over data and context parallelism in place, rows sharded over SSP over their replicas only.

    Every rank of the groups calls it with the same parameters; a missing gradient counts as 0. Under sequence parallelism the
    gradients of norms are summed over TP as well.
    """
    size = groups.dp_cp.size()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        group = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.ssp_replicas
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(size)
        if getattr(parameter, "sequence_parallel", False) and groups.tp.size() > 1:
            dist.all_reduce(parameter.grad, group=groups.tp)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], groups: ProcessGroupCollection, max_norm: float) -> float:
    """Scale reduced gradients in place so that the norm of the whole model's gradient is at most `max_norm`; returns the norm.

    Collective over TP and SSP; every parameter is counted once, wherever its parts lie.
    """
    parameters = list(parameters)
    dense, owned = _square_sum(parameters, groups, True), _square_sum(parameters, groups, False)
    dist.all_reduce(dense, group=groups.mp)
    if getattr(groups, "ssp", None) is not None:
        dist.all_reduce(owned, group=groups.tp_ep_pp)
    norm = float((dense + owned).sqrt())
    if norm > max_norm:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / (norm + 1e-6))
    return norm


def _square_sum(parameters: list[nn.Parameter], groups: ProcessGroupCollection, dense: bool) -> Tensor:
    total = torch.zeros((), device=parameters[0].device)
    for p in parameters:
        whole = not getattr(p, "tensor_model_parallel", False)
        if p.grad is None or getattr(p, "allreduce", True) != dense or (whole and groups.tp.rank() > 0):
            continue  # a parameter that every TP rank holds is counted by the first
        total += p.grad.float().square().sum()
    return total
