"""SSP groups: blocks of consecutive ranks, replicas across them, several in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ta_plugin import SSPGroup, create_ssp_group
from ta_plugin.parallel import average_gradients


def layout(size: int) -> tuple[Any, ...]:
    group = create_ssp_group(size)
    mine = torch.tensor([dist.get_rank()])
    members = [torch.empty_like(mine) for _ in range(group.size)]
    dist.all_gather(members, mine, group=group.group)
    replicas = [mine]
    if group.replicas is not None:
        replicas = [torch.empty_like(mine) for _ in range(group.num_replicas)]
        dist.all_gather(replicas, mine, group=group.replicas)
    return group.size, group.rank, [int(m) for m in members], [int(r) for r in replicas], group.data_parallel_size


def refuse(size: int) -> str:
    try:
        create_ssp_group(size)
    except ValueError as failure:
        return str(failure)
    return "no error"


def average(size: int) -> list[list[float]]:
    group = create_ssp_group(size)
    rank = dist.get_rank()
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    a.grad = torch.arange(3.0) + rank
    if rank == 1:  # elsewhere it counts as 0
        b.grad = torch.tensor([4.0, 8.0], dtype=torch.float64)
    average_gradients([a, b, frozen], group)
    assert frozen.grad is None
    return [p.grad.tolist() for p in (a, b) if p.grad is not None]


@pytest.mark.parametrize(
    ("size", "blocks", "replicas"),
    [
        (4, [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
        (2, [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
        (1, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
    ],
)
def test_groups_are_blocks_and_replicas_are_strides(
    rank_pools: Any, size: int, blocks: list[list[int]], replicas: list[list[int]]
) -> None:
    for rank, outcome in enumerate(rank_pools(4).run(layout, size)):
        block = next(b for b in blocks if rank in b)
        strides = next(r for r in replicas if rank in r)
        assert outcome == (size, block.index(rank), block, strides, 4)


@pytest.mark.parametrize("size", [3, 0, -1, 8])
def test_a_size_that_does_not_divide_raises_on_every_rank(rank_pools: Any, size: int) -> None:
    expected = f"size is {size}, which does not divide the 4 ranks; choose one of [1, 2, 4]"
    assert rank_pools(4).run(refuse, size) == [expected] * 4


@pytest.mark.parametrize("size", [4, 2, 1])
def test_dense_gradients_become_the_mean_over_all_ranks(rank_pools: Any, size: int) -> None:
    assert rank_pools(4).run(average, size) == [[[1.5, 2.5, 3.5], [1.0, 2.0]]] * 4


def test_without_torch_distributed_there_is_one_rank() -> None:
    group = create_ssp_group(1)
    assert (group.size, group.rank, group.num_replicas, group.data_parallel_size) == (1, 0, 1, 1)
    assert SSPGroup.wrap(group) is group
    assert SSPGroup.wrap(None).size == 1
    with pytest.raises(ValueError, match="init_process_group"):
        create_ssp_group(2)


def test_each_group_counts_its_own_traffic() -> None:
    a, b = SSPGroup(None), SSPGroup(None)
    a.traffic.record("x", torch.zeros(0, 3), 5)
    assert (a.traffic.elements["x"], a.traffic.bytes["x"], b.traffic.total_bytes()) == (15, 60, 0)
    a.traffic.reset()
    assert a.traffic.total_bytes() == 0
