"""Row collectives on gloo ranks: what arrives, what flows back, in which order, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin import SSPGroup
from ta_plugin.parallel import (
    all_gather_rows,
    all_to_all_rows,
    reduce_scatter_rows,
    start_all_gather_rows,
    start_all_to_all_rows,
)

SENDS = {  # SENDS[ranks][source][destination]
    2: [[2, 3], [0, 1]],
    4: [[0, 1, 2, 3], [4, 0, 0, 1], [0, 0, 0, 0], [2, 2, 0, 5]],
}
ROWS = {2: [3, 0], 4: [2, 0, 5, 1]}
EVEN = {2: [2, 2], 4: [2, 2, 2, 2]}


def random_rows(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_all_to_all(sends: list[list[int]]) -> None:
    group = SSPGroup(dist.group.WORLD)
    me, n = group.rank, group.size
    everyone = [random_rows(sum(sends[r]), r).requires_grad_() for r in range(n)]
    pieces = [x.split(send) for x, send in zip(everyone, sends, strict=True)]
    expected = [torch.cat([pieces[source][to] for source in range(n)]) for to in range(n)]
    weights = [random_rows(e.shape[0], 100 + r) for r, e in enumerate(expected)]
    sum((e.square() * w).sum() for e, w in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]

    x = everyone[me].detach().requires_grad_()
    receive = [sends[source][me] for source in range(n)]
    out = all_to_all_rows(x, sends[me], receive, group, "test")
    assert torch.equal(out, expected[me])
    (grad,) = torch.autograd.grad((out.square() * weights[me]).sum(), x, create_graph=True)
    assert torch.equal(grad, everyone[me].grad)
    away, back = sum(sends[me]) - sends[me][me], sum(receive) - receive[me]
    assert group.traffic.elements["test"] == away * 6
    assert group.traffic.bytes["test"] == away * 48
    assert group.traffic.elements["test.grad"] == back * 6
    assert group.traffic.calls == {"test": 1, "test.grad": 1} and group.traffic.total_calls() == 2
    grad.sum().backward()  # of second order: a sum over every rank's 2 * weight
    (second,) = torch.autograd.grad(
        sum((2 * e * w).sum() for e, w in zip(expected, weights, strict=True)), everyone[me]
    )
    assert torch.equal(x.grad, second)


def check_gather_and_scatter(rows: list[int]) -> None:
    group = SSPGroup(dist.group.WORLD)
    me, n, total = group.rank, group.size, sum(rows)
    parts = [random_rows(r, i) for i, r in enumerate(rows)]
    weights = [random_rows(total, 100 + r) for r in range(n)]
    mine = slice(sum(rows[:me]), sum(rows[: me + 1]))

    x = parts[me].clone().requires_grad_()
    gathered = all_gather_rows(x, rows, group, "gather")
    assert torch.equal(gathered, torch.cat(parts))
    (gathered * weights[me]).sum().backward()
    torch.testing.assert_close(x.grad, sum(weights)[mine], rtol=0, atol=1e-12)  # type: ignore[index]

    y = weights[me].clone().requires_grad_()
    scattered = reduce_scatter_rows(y, rows, group, "scatter")
    torch.testing.assert_close(scattered, sum(weights)[mine], rtol=0, atol=1e-12)  # type: ignore[index]
    (scattered * parts[me]).sum().backward()
    assert torch.equal(y.grad, torch.cat(parts))

    away = total - rows[me]
    assert group.traffic.elements["gather"] == (n - 1) * rows[me] * 6
    assert group.traffic.elements["scatter"] == away * 6
    assert group.traffic.elements["gather.grad"] == away * 6
    assert group.traffic.elements["scatter.grad"] == (n - 1) * rows[me] * 6


def check_moving(rows: list[int], sends: list[list[int]]) -> None:
    """What was started arrives as if it had been waited for at once, gradients too, and counts as much traffic."""
    waited, moving = SSPGroup(dist.group.WORLD), SSPGroup(dist.group.WORLD)
    me, n = waited.rank, waited.size
    receive = [sends[source][me] for source in range(n)]
    results = []
    for group, later in ((waited, False), (moving, True)):
        part, sent = random_rows(rows[me], me).requires_grad_(), random_rows(sum(sends[me]), 9 + me).requires_grad_()
        ids = torch.arange(sum(sends[me])) + 100 * me
        if later:
            flights = [start_all_gather_rows(part, rows, group, "gather")]
            flights += [start_all_to_all_rows(x, sends[me], receive, group, "exchange") for x in (sent, ids)]
            arrived = [flight.arrive() for flight in flights]
        else:
            exchanged = [all_to_all_rows(x, sends[me], receive, group, "exchange") for x in (sent, ids)]
            arrived = [all_gather_rows(part, rows, group, "gather"), *exchanged]
        assert not arrived[2].requires_grad
        (arrived[0].sin().sum() * (1 + me) + arrived[1].square().sum()).backward()
        results.append([*arrived, part.grad, sent.grad])
    for ours, exact in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, exact)  # type: ignore[arg-type]
    assert moving.traffic.elements == waited.traffic.elements


class Between(torch.autograd.Function):
    """Says when it runs, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("between")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("between")
        return grad, None


def log_of_a_transfer() -> list[str]:
    group, log, original = SSPGroup(dist.group.WORLD), [], dist.all_to_all_single

    class Logged:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            log.append("wait")
            self.work.wait()

    def logged(*args: Any, **named: Any) -> Logged:
        log.append("start")
        assert named["async_op"]
        return Logged(original(*args, **named))

    x, y = (random_rows(2, seed).requires_grad_() for seed in range(2))
    dist.all_to_all_single = logged
    try:
        flight = start_all_to_all_rows(x, [1, 1], [1, 1], group, "x")
        other = Between.apply(y, log)
        (flight.arrive() * other).sum().backward()
    finally:
        dist.all_to_all_single = original
    return log


def sums_in_rank_order() -> list[Tensor]:
    """float32 sums whose value depends on the order of addition."""
    group = SSPGroup(dist.group.WORLD)
    rows = [50] * group.size
    x = random_rows(sum(rows), group.rank).float() * 10.0 ** (4 * group.rank)
    return [reduce_scatter_rows(x, rows, group, "sum") for _ in range(3)]


def integers_travel() -> None:
    group = SSPGroup(dist.group.WORLD)
    ids = torch.full((group.size,), 2**62 + group.rank)
    out = all_to_all_rows(ids, [1] * group.size, [1] * group.size, group, "ids")
    assert out.tolist() == [2**62 + r for r in range(group.size)]
    assert not out.requires_grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_to_all_moves_rows_and_gradients(rank_pools: Any, ranks: int) -> None:
    rank_pools(ranks).run(check_all_to_all, SENDS[ranks])
    rank_pools(ranks).run(check_all_to_all, [[0] * ranks] * ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_gather_and_reduce_scatter_are_each_others_transpose(rank_pools: Any, ranks: int) -> None:
    for rows in (ROWS[ranks], EVEN[ranks], [0] * ranks):
        rank_pools(ranks).run(check_gather_and_scatter, rows)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_was_started_arrives(rank_pools: Any, ranks: int) -> None:
    for rows in (ROWS[ranks], EVEN[ranks]):
        rank_pools(ranks).run(check_moving, rows, SENDS[ranks])


def test_a_transfer_runs_beside_what_lies_between_start_and_arrival_forward_and_backward(rank_pools: Any) -> None:
    assert rank_pools(2).run(log_of_a_transfer) == [["start", "between", "wait"] * 2] * 2


def test_sums_over_ranks_are_taken_in_rank_order(rank_pools: Any) -> None:
    parts = [random_rows(200, r).float() * 10.0 ** (4 * r) for r in range(4)]
    expected = parts[0] + parts[1] + parts[2] + parts[3]
    backwards = parts[3] + parts[2] + parts[1] + parts[0]
    assert not torch.equal(expected, backwards)  # the order shows
    for rank, results in enumerate(rank_pools(4).run(sums_in_rank_order)):
        assert all(torch.equal(r, expected[50 * rank : 50 * rank + 50]) for r in results)


def test_integers_arrive_whole(rank_pools: Any) -> None:
    rank_pools(2).run(integers_travel)


def test_one_rank_passes_through_and_sends_nothing() -> None:
    group, x = SSPGroup(None), torch.ones(2, 3, requires_grad=True)
    outs = [
        all_to_all_rows(x, [2], [2], group, "x"),
        all_gather_rows(x, [2], group, "x"),
        reduce_scatter_rows(x, [2], group, "x"),
        start_all_to_all_rows(x, [2], [2], group, "x").arrive(),
        start_all_gather_rows(x, [2], group, "x").arrive(),
    ]
    assert all(out is x for out in outs)
    assert group.traffic.total_bytes() == group.traffic.total_calls() == 0
