"""Buckets on ranks: several tensors of several dtypes in one all-to-all, what flows back, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin import SSPGroup
from ta_plugin.parallel import Blank, Buckets

SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((3,), torch.int64),
    ((5,), torch.int32),
    ((3, 2), torch.bfloat16),
    ((2, 3), torch.float32),
    ((1,), torch.bool),
    ((0,), torch.float32),
    ((1, 3), torch.float64),
]


def parts_of(rank: int, ranks: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rank)
    return [torch.randint(0, 2 if d == torch.bool else 99, (ranks, *shape), generator=g).to(d) for shape, d in SHAPES]


def check_exchange() -> None:
    group = SSPGroup(dist.group.WORLD)
    me, n = group.rank, group.size
    every = [parts_of(rank, n) for rank in range(n)]
    mine = [x.requires_grad_(x.dtype in (torch.bfloat16, torch.float64)) for x in parts_of(me, n)]
    moving = Buckets(mine, group, "test")
    arrived = moving.arrive()
    for i, x in enumerate(arrived):
        assert x.dtype == SHAPES[i][1] and torch.equal(x, torch.stack([every[source][i][me] for source in range(n)]))
    total = sum((arrived[i].double() * (me + 1) * torch.arange(1, n + 1).view(-1, 1, 1)).sum() for i in (2, 6))
    total.backward()  # type: ignore[union-attr]
    for i in (2, 6):  # what rank r did with my part: times its r + 1, and times my place among its sources
        wanted = torch.arange(1, n + 1, dtype=torch.float64).view(-1, 1, 1) * (me + 1)
        assert torch.equal(mine[i].grad, wanted.expand(mine[i].shape).to(mine[i].dtype))
    assert all(x.grad is None for i, x in enumerate(mine) if i not in (2, 6))
    assert group.traffic.calls == {"test": 1, "test.grad": 1}
    assert group.traffic.bytes == {
        "test": (n - 1) * (32 + 32 + 16 + 32 + 16 + 0 + 32),
        "test.grad": (n - 1) * (16 + 32),
    }

    with torch.no_grad():  # none flows back
        (again,) = Buckets([mine[2]], group, "test").arrive()
    assert not again.requires_grad and torch.equal(again, arrived[2])


def check_blank() -> None:
    group = SSPGroup(dist.group.WORLD)
    rows = torch.arange(3) + 10 * torch.arange(group.size)[:, None]

    def fill(blank: list[Tensor]) -> None:
        (part,) = blank
        part.copy_(rows * (group.rank + 1))

    parts = [torch.ones(group.size, 1), Blank(rows.shape, torch.int32), torch.ones(group.size, 2)]
    head, filled, tail = Buckets(parts, group, "test", fill).arrive()
    assert bool((head == 1).all()) and bool((tail == 1).all()) and filled.dtype == torch.int32
    for source in range(group.size):
        assert torch.equal(filled[source], rows[group.rank].int() * (source + 1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_every_dtype_arrive_and_gradients_return(rank_pools: Any, ranks: int) -> None:
    rank_pools(ranks).run(check_exchange)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_blank_is_written_where_it_is_sent_from(rank_pools: Any, ranks: int) -> None:
    rank_pools(ranks).run(check_blank)
