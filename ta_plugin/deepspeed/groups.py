"""The SSP group beside DeepSpeed's groups, and what the engine divides summed gradients by."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroup

from ta_plugin.deepspeed.config import BLOCK
from ta_plugin.parallel import SSPGroup


def world_group() -> SSPGroup:
    """All ranks, for what every one of them must agree on."""
    return SSPGroup(dist.group.WORLD, device=accelerator_device())


def accelerator_device() -> torch.device:
    """The device DeepSpeed trains on."""
    return torch.device(get_accelerator().current_device_name())


def data_parallel_group(mpu: Any) -> ProcessGroup:
    """The ranks whose samples differ while tensor and pipeline coordinates are equal; sequence-parallel peers are among them."""
    if mpu is None:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    for name in ("get_sequence_data_parallel_group", "get_data_parallel_group"):
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    raise ValueError(f"mpu is {mpu!r}, which has no get_data_parallel_group(); wrap Megatron's in MegatronMPU")


def create_groups(size: int | None, mpu: Any) -> SSPGroup:
    """Divide the data-parallel ranks into SSP groups of `size` (default: all of them). Collective over all ranks.

    Every rank creates every group here and now, so a pipeline stage without tokenized layers cannot hold the others up.
    """
    mine = dist.get_process_group_ranks(data_parallel_group(mpu))
    everybodys: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybodys, mine)
    partition = sorted({tuple(ranks) for ranks in everybodys})
    total = len(mine)
    size = total if size is None else size
    if any(len(ranks) != total for ranks in partition) or total % size:
        sizes = [s for s in range(1, total + 1) if total % s == 0]
        raise ValueError(
            f"{BLOCK}.size is {size}, which does not divide the {total} data-parallel ranks; choose one of {sizes}"
        )
    blocks = [ranks[i : i + size] for ranks in partition for i in range(0, total, size)]
    strides = [ranks[i::size] for ranks in partition for i in range(size)]
    return SSPGroup(
        _mine_of(blocks) if size > 1 else None,
        replicas=_mine_of(strides) if size < total else None,
        device=accelerator_device(),
    )


def gradient_divisor(engine: Any) -> float:
    """What `engine` divides the sum of all data-parallel ranks' dense gradients by.

    Sequence-parallel peers count as one at stages 0 to 2: their gradients are summed, not averaged.
    """
    if not engine.gradient_average and engine.zero_optimization_stage() < 3:
        return 1.0
    ranks = dist.get_world_size(data_parallel_group(engine.mpu))
    return ranks / sequence_parallel_sum(engine)


def sequence_parallel_sum(engine: Any) -> int:
    """Over how many sequence-parallel ranks `engine` sums dense gradients instead of averaging them."""
    return engine.sequence_parallel_size if engine.zero_optimization_stage() < 3 else 1


def _mine_of(rank_lists: list[tuple[int, ...]]) -> ProcessGroup | None:
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    return mine
