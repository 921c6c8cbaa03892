"""Corners of the whole path: NaN rows, the embedding_fn protocol, 63-bit ids, low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention
from ta_plugin.routing import HashOwners

VOCAB, EMBED, POISON = 12, 8, 11


def attention(ranks: int, batch: int, length: int, table: Any, projected: bool, **options: Any) -> TokenizedAttention:
    torch.manual_seed(1)
    maps = {name: nn.Linear(EMBED, EMBED) for name in ("query", "key", "value")} if projected else {}
    return TokenizedAttention(batch, length, ranks, table, num_heads=2, **maps, **options)


def poisoned_batch(rank: int) -> dict[str, Tensor]:
    """Only the second sample of rank 0 holds the poisoned token, beside tokens 8 to 10 that no other sample holds."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 8, (3, 6), generator=generator)
    if rank == 0:
        tokens[1] = torch.tensor([8, POISON, 9, POISON, 10, 8])
    tokens[2, 4:] = POISON  # past its length
    return {
        "tokens": tokens,
        "lengths": torch.tensor([6, 5, 4]),
        "targets": torch.randint(0, 8, (3, 2), generator=generator),
    }


def spread_of_nan(strategy: str, targets: bool, projected: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch = poisoned_batch(rank)
    if not targets:
        del batch["targets"]
    runs = []
    for poison in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(VOCAB, EMBED)
        if poison:
            table.weight.data[POISON] = torch.nan
        model = attention(ranks, 3, 6, table, projected, strategy=strategy)
        out = model(**batch)
        out.square().sum().backward()
        grad = torch.zeros_like(table.weight) if table.weight.grad is None else table.weight.grad
        dist.all_reduce(grad)
        runs.append((out.detach(), grad))
    (clean, clean_grad), (out, grad) = runs
    for b in range(3):
        if (rank, b) == (0, 1):
            assert torch.isnan(out[b][: 5 if not targets else 2]).all()
        else:
            assert torch.equal(out[b], clean[b])
    elsewhere = list(range(8))  # tokens of samples that do not hold it
    if targets:  # the poisoned sample's own targets are tokens too
        elsewhere = [t for t in elsewhere if t not in poisoned_batch(0)["targets"][1].tolist()]
    assert torch.equal(grad[elsewhere], clean_grad[elsewhere])
    assert torch.isfinite(grad[elsewhere]).all()
    assert grad[elsewhere].any()
    assert torch.isnan(grad[[8, 9]]).all()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    ("strategy", "targets"), [("gather", False), ("gather", True), ("owner", True), ("positions", False)]
)
def test_a_nan_embedding_reaches_only_samples_that_hold_its_token(
    rank_pools: Any, strategy: str, targets: bool, projected: bool
) -> None:
    rank_pools(2).run(spread_of_nan, strategy, targets, projected)


class Recorder:
    """An embedding_fn without a table: rows computed from the id, calls written down."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls.append(ids.tolist())
        powers = torch.arange(1, EMBED + 1, dtype=torch.float64)
        return self.scale * (ids[:, None] % 1009 * powers).sin()


def record_calls(strategy: str, tokens: list[list[list[int]]]) -> list[list[int]]:
    group = SSPGroup(dist.group.WORLD)
    recorder = Recorder()
    mine = torch.tensor(tokens[group.rank])
    model = attention(group.size, *mine.shape, recorder, False, strategy=strategy, group=group)
    alone = attention(1, *mine.shape, Recorder(), False)
    batch = {"tokens": mine, "lengths": torch.full((mine.shape[0],), mine.shape[1])}
    if strategy == "owner":
        batch["targets"] = mine[:, :1]
    out = model(**batch)
    torch.testing.assert_close(out, alone(**batch), rtol=0, atol=1e-12)
    out.sum().backward()
    for ids in recorder.calls:
        assert len(set(ids)) == len(ids)
        assert (HashOwners(group.size).owner_of(torch.tensor(ids, dtype=torch.int64)) == group.rank).all()
    return recorder.calls


@pytest.mark.parametrize("strategy", ["gather", "owner"])
def test_the_embedding_fn_sees_owned_ids_each_once_and_63_bits_of_them(rank_pools: Any, strategy: str) -> None:
    tokens = [[[2**62, 5, 5, 2**62], [5, 2**62 - 1, 7, 7]], [[5, 5, 2**63 - 2, 0], [2**62, 2**62, 1, 5]]]
    calls = rank_pools(2).run(record_calls, strategy, tokens)
    asked = sorted(i for rank in calls for i in rank[-1])  # of both ranks, for the history
    assert asked == sorted({i for rank in tokens for sample in rank for i in sample})


@pytest.mark.parametrize("strategy", ["gather", "owner"])
def test_a_rank_that_owns_nothing_is_asked_for_nothing(rank_pools: Any, strategy: str) -> None:
    calls = rank_pools(2).run(record_calls, strategy, [[[4, 4, 4]], [[4, 4, 4]]])
    assert sorted(rank[-1] for rank in calls) == [[], [4]]


def test_one_token_a_thousand_times_in_bfloat16() -> None:
    torch.manual_seed(0)  # the bound is for this table: rounding others costs up to 0.026
    table = nn.Embedding(2, EMBED)
    tokens, lengths = torch.zeros(1, 1001, dtype=torch.int64), torch.tensor([1001])
    tokens[0, 500] = 1
    exact = attention(1, 1, 1001, table, False).double()(tokens, lengths)
    out = attention(1, 1, 1001, table, False).bfloat16()(tokens, lengths)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0), (1, 1)])
@pytest.mark.parametrize("strategy", ["gather", "owner"])
def test_the_smallest_batches(batch: int, length: int, strategy: str) -> None:
    model = attention(1, batch, length, nn.Embedding(VOCAB, EMBED), True, strategy=strategy)
    tokens, lengths = torch.zeros(batch, length, dtype=torch.int64), torch.full((batch,), length)
    targets = torch.zeros(batch, 2, dtype=torch.int64)
    out = model(tokens, lengths, targets=targets)
    assert out.shape == (batch, 2, EMBED)
    out.sum().backward()
    assert torch.isfinite(out).all()
