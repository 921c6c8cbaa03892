"""CapturedStep on several ranks: under NCCL the step's collectives are in the graph, and replays equal the eager step to the bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import ON_GPUS
from torch import Tensor, nn

from ta_plugin import CapturedStep, ShardedTokenEmbedding, SSPGroup, TokenizedAttention
from ta_plugin.parallel import average_gradients

B, L, T, V, D = 5, 40, 3, 500, 32


def build(group: SSPGroup, dtype: torch.dtype, **bounds: int) -> Any:
    """A model, its table and the step."""
    torch.manual_seed(1)
    table = ShardedTokenEmbedding(V, D, group, dtype=dtype)
    maps = {name: nn.Linear(D, D, dtype=dtype) for name in ("query", "key", "value", "output")}
    model = TokenizedAttention(B, L, group.size, table, group=group, num_heads=2, strategy="owner", **maps, **bounds)

    def step(tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        out = model(tokens, lengths, targets=targets)
        loss = out.float().square().sum() + out.float().sum()
        loss.backward()
        average_gradients(model.parameters(), group)
        return torch.cat([out.detach().float().flatten(), loss.detach().reshape(1)])

    return model, table, step


def batch(seed: int, rank: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(100 * seed + rank)
    lengths = torch.randint(0, L + 1, (B,), generator=g) * int(seed != 3 or rank > 0)  # once a rank reads nothing
    tokens, targets = (torch.randint(0, V, (B, n), generator=g) for n in (L, T))
    return [tokens, lengths, targets]


def replays_equal_the_step(dtype: torch.dtype) -> None:
    group = SSPGroup(dist.group.WORLD)
    eager, eager_table, step = build(group, dtype, row_bound=B * L)
    model, table, bounded = build(group, dtype, row_bound=B * L)
    *_, unbounded = build(group, dtype)
    captured = CapturedStep(bounded, [model], batch(0, group.rank))
    for seed in range(1, 6):  # the rows of the last step are trained on
        inputs = batch(seed, group.rank)
        eager.zero_grad()
        model.zero_grad()
        before = model.group.traffic.copy()
        expected, found = step(*inputs), captured(*inputs)
        assert torch.equal(found, expected)
        if seed == 1:  # before anything was trained
            assert torch.equal(found, unbounded(*inputs))
        for ours, exact in zip(model.parameters(), eager.parameters(), strict=True):
            assert ours.grad is not None and torch.equal(ours.grad, exact.grad)
        for each in (table, eager_table):
            each.step()
        assert torch.equal(table.rows, eager_table.rows)
        sent = model.group.traffic.since(before)
        assert sent.bytes["keys"] > 0 and sent.calls["partials"] == sent.calls["partials.grad"] >= 1
    model.check_bounds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_replays_equal_the_step(rank_pools: Any, ranks: int, dtype: torch.dtype) -> None:
    rank_pools(ranks).run(replays_equal_the_step, dtype)


def one_rank_does_not_fit() -> str:
    group = SSPGroup(dist.group.WORLD)
    model, table, bounded = build(group, torch.float32, row_bound=30)
    tokens, lengths, targets = batch(0, group.rank)
    captured = CapturedStep(bounded, [model], [tokens, lengths.clamp(max=3), targets])  # warming up is noted too
    tokens, lengths, targets = batch(1, group.rank)
    short, full = lengths.clamp(max=3), torch.full_like(lengths, L)
    table.zero_grad()
    out = captured(tokens, full if group.rank == 1 else short, targets)
    assert bool(out.isnan().all())
    table.zero_grad()
    assert bool(captured(tokens, short, targets).isfinite().all())
    table.zero_grad()
    try:
        model.check_bounds()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_replay_that_does_not_fit_on_one_rank_gives_nan_on_all(rank_pools: Any, ranks: int) -> None:
    for text in rank_pools(ranks).run(one_rank_does_not_fit):
        assert text.startswith(f"rank 1 of {ranks}: distinct rows of a batch reached")


def a_capture_fails_on_one_rank() -> str:
    group = SSPGroup(dist.group.WORLD)
    model, _, bounded = build(group, torch.float32, row_bound=B * L)

    def step(*inputs: Tensor) -> Tensor:
        if group.rank == 1 and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("out of something")
        return bounded(*inputs)

    text = ""
    try:
        CapturedStep(step, [model], batch(0, group.rank))
    except ValueError as error:
        text = str(error)
    again = CapturedStep(bounded, [model], batch(0, group.rank))  # nobody was left waiting, and no capture is open
    assert torch.equal(again(*batch(1, group.rank)), bounded(*batch(1, group.rank)))
    return text


@pytest.mark.skipif(not ON_GPUS, reason="needs GPUs")
def test_a_capture_that_fails_on_one_rank_fails_on_all(rank_pools: Any) -> None:
    assert set(rank_pools(2).run(a_capture_fails_on_one_rank)) == {"rank 1 of 2: out of something"}


def a_stand_in_capture_fails_on_one_rank() -> str:
    """The same where nothing can be captured: torch.cuda is a stand-in, and the step sends nothing."""
    group, calls = SSPGroup(dist.group.WORLD), []
    model, *_ = build(group, torch.float32, row_bound=B * L)

    def step(x: Tensor) -> Tensor:
        calls.append(x)
        if group.rank == 1 and len(calls) == 3:  # warmed up twice
            raise RuntimeError("out of something")
        return x

    captured = CapturedStep(step, [model], [torch.zeros(1)])
    try:
        with mock.patch.object(torch, "cuda", mock.MagicMock()):
            captured._capture(2)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.skipif(ON_GPUS, reason="captures there")
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_stand_in_capture_that_fails_on_one_rank_fails_on_all(rank_pools: Any, ranks: int) -> None:
    found = rank_pools(ranks).run(a_stand_in_capture_fails_on_one_rank)
    assert set(found) == {f"rank 1 of {ranks}: out of something"}
