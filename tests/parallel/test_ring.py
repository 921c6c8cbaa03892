"""One hop around the ring: what arrives, what flows back, and that both directions are under way while the rank computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin import SSPGroup
from ta_plugin.parallel import Hop

ROWS = {2: [3, 0], 4: [2, 0, 5, 1]}
NAMES = ("keys", "values")


def rows_of(rank: int, rows: list[int]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(rows[rank], w, generator=g, dtype=torch.float64).requires_grad_() for w in (3, 2))  # type: ignore[return-value]


def weight_of(rank: int, source: int, x: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(100 * rank + source)
    return torch.randn(x.shape, generator=g, dtype=torch.float64)


def loss_of(rank: int, source: int, tensors: tuple[Tensor, ...]) -> Tensor:
    return sum(((x.square() * weight_of(rank, source, x)).sum() for x in tensors), torch.zeros((), dtype=torch.float64))


def check_round(rows: list[int]) -> None:
    group = SSPGroup(dist.group.WORLD)
    me, n = group.rank, group.size
    everybody = [rows_of(r, rows) for r in range(n)]
    sum(loss_of(r, s, everybody[s]) for r in range(n) for s in range(n)).backward()  # type: ignore[union-attr]
    mine = rows_of(me, rows)
    block, loss = mine, torch.zeros((), dtype=torch.float64)
    for step in range(n):
        source = (me - step) % n
        hop = Hop(block, rows[source - 1], group, NAMES) if step + 1 < n else None
        for x, expected in zip(block, everybody[source], strict=True):
            assert torch.equal(x, expected)
        loss = loss + loss_of(me, source, block)
        if hop is not None:
            block = hop.arrive()
    loss.backward()
    for x, expected in zip(mine, everybody[me], strict=True):
        torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=1e-12)
    passed = sum(rows) - rows[(me + 1) % n]  # everybody's but the block that ends here
    returned = sum(rows) - rows[me]
    assert [group.traffic.elements[name] for name in NAMES] == [3 * passed, 2 * passed]
    assert [group.traffic.elements[f"{name}.grad"] for name in NAMES] == [3 * returned, 2 * returned]


class Watch(torch.autograd.Function):
    """Notes whether the hop has messages under way when this node runs forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hop: Hop, seen: list[bool]) -> Tensor:
        ctx.hop, ctx.seen = hop, seen
        seen.append(bool(hop._works))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(bool(ctx.hop._works))
        return grad, None, None


def watch() -> list[bool]:
    group, seen = SSPGroup(dist.group.WORLD), []  # type: ignore[var-annotated]
    x = torch.ones(4, 2, requires_grad=True)
    hop = Hop((x,), 4, group, ("x",))
    here = Watch.apply(x.square(), hop, seen)
    (arrived,) = hop.arrive()
    seen.append(bool(hop._works))
    (here.sum() + 3 * arrived.sum()).backward()
    seen.append(bool(hop._works))
    assert torch.equal(x.grad, torch.full((4, 2), 5.0))
    return seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_round_brings_every_block_and_returns_every_gradient(rank_pools: Any, ranks: int) -> None:
    for rows in (ROWS[ranks], [2] * ranks, [0] * ranks):
        rank_pools(ranks).run(check_round, rows)


def test_messages_are_under_way_while_the_rank_computes_forward_and_backward(rank_pools: Any) -> None:
    for seen in rank_pools(2).run(watch):
        assert seen == [True, False, True, False]  # forward, after arriving, backward, at the end
