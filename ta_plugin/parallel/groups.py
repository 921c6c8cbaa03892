"""The sequence-sparsity parallel (SSP) group, and the replicas beside it (DESIGN section 4, "Where SSP sits")."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ta_plugin.parallel.traffic import Traffic


class SSPGroup:
    """N ranks over which tokens are owned and routed, and the replicas that own the same tokens.

    group:    the process group of the N ranks; None for one rank without torch.distributed
    replicas: the process group of the ranks that hold this rank's rows in other SSP groups; None when there are none
    device:   where payloads live; by default the group's backend decides (cuda for nccl, cpu for gloo)
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        *,
        replicas: ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.group = group
        self.replicas = replicas
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.num_replicas = dist.get_world_size(replicas) if replicas is not None else 1
        self.traffic = Traffic()
        self._device = torch.device(device) if device is not None else None

    @property
    def data_parallel_size(self) -> int:
        """DP = SSP x replicas: the number of ranks whose losses are averaged."""
        return self.size * self.num_replicas

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the group."""
        return dist.get_process_group_ranks(self.group) if self.group is not None else [0]

    @property
    def device(self) -> torch.device:
        """Where this rank's payloads live."""
        if self._device is not None:
            return self._device
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    @classmethod
    def wrap(cls, group: SSPGroup | ProcessGroup | None) -> SSPGroup:
        """An SSPGroup from a process group, from None (one rank), or unchanged."""
        return group if isinstance(group, SSPGroup) else cls(group)

    def __repr__(self) -> str:
        return f"SSPGroup(rank {self.rank} of {self.size}, {self.num_replicas} replica(s), {self.device})"


def create_ssp_group(size: int, *, device: torch.device | str | None = None) -> SSPGroup:
    """Divide all ranks into SSP groups of `size` consecutive ranks; call it on every rank, in the same order.

    Rank r lands in group r // size; the ranks with equal r % size are replicas of each other. Raises ValueError when
    `size` does not divide the number of ranks.
    """
    if not dist.is_initialized():
        if size != 1:
            raise ValueError(f"size is {size}, but torch.distributed is not initialised; call init_process_group first")
        return SSPGroup(None, device=device)
    world = dist.get_world_size()
    if size < 1 or world % size:
        sizes = [s for s in range(1, world + 1) if world % s == 0]
        raise ValueError(f"size is {size}, which does not divide the {world} ranks; choose one of {sizes}")
    mine: list[ProcessGroup | None] = [None, None]
    blocks = [list(range(first, first + size)) for first in range(0, world, size)]
    strides = [list(range(first, world, size)) for first in range(size)] if size < world else []
    for slot, rank_lists in enumerate((blocks, strides)):
        for ranks in rank_lists:  # every rank creates every group, in one order
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine[slot] = group
    return SSPGroup(mine[0], replicas=mine[1], device=device)
