"""What each strategy sends, counted at the collectives' buffers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ta_plugin import SSPGroup, TokenizedAttention, UniqueSpace
from ta_plugin.routing import HashOwners

RANKS, BATCH, TARGETS, EMBED, HEADS, HEAD_DIM = 4, 3, 2, 8, 2, 3
D = HEADS * HEAD_DIM  # of the formula: the width of all heads


@dataclass(frozen=True)
class Case:
    strategy: str
    length: int = 40
    vocab: int = 30
    targets: bool = True
    queries: bool = False  # given as embeddings
    distinct: bool = False
    calls: int = 1


def batch_of(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    if case.distinct:
        tokens = torch.stack([torch.randperm(case.vocab, generator=generator)[: case.length] for _ in range(BATCH)])
    else:
        tokens = torch.randint(0, case.vocab, (BATCH, case.length), generator=generator)
    return tokens, torch.full((BATCH,), case.length)


def count(case: Case) -> tuple[Counter[str], Counter[str]]:
    """Elements this rank sent in `calls` forward passes, and in one backward."""
    group = SSPGroup(dist.group.WORLD)
    maps = {name: nn.Linear(EMBED, D) for name in ("query", "key", "value")}
    model = TokenizedAttention(
        BATCH, case.length, RANKS, nn.Embedding(case.vocab, EMBED), group=group, num_heads=HEADS,
        strategy=case.strategy, **maps,
    )  # fmt: skip
    options: dict[str, Any] = {}
    if case.queries:
        options["queries"] = torch.randn(BATCH, TARGETS, EMBED)
    elif case.targets:
        options["targets"] = torch.arange(BATCH * TARGETS).view(BATCH, TARGETS) % case.vocab
    group.traffic.reset()
    for _ in range(case.calls):
        out = model(*batch_of(case, group.rank), **options)
    forward = Counter(group.traffic.elements)
    out.sum().backward()
    backward = Counter(group.traffic.elements)
    backward.subtract(forward)
    return forward, backward


def elsewhere(ids: torch.Tensor, rank: int) -> int:
    """How many of these ids another rank owns."""
    return int((HashOwners(RANKS).owner_of(ids) != rank).sum())


def rows_of(case: Case, rank: int) -> torch.Tensor:
    return UniqueSpace.from_padded(*batch_of(case, rank)).tokens


def total(counters: list[Counter[str]], name: str) -> int:
    return sum(c[name] for c in counters)


@pytest.mark.parametrize("length", [10, 40, 400])
def test_owner_sends_queries_and_partials_whatever_the_length(rank_pools: Any, length: int) -> None:
    case = Case("owner", length=length, queries=True)
    expected = (RANKS - 1) * BATCH * TARGETS * (2 * D + HEADS)
    for rank, (forward, backward) in enumerate(rank_pools(RANKS).run(count, case)):
        moved = forward["queries"] + forward["partials"] + forward["partials.lse"]
        assert moved == expected
        returned = backward["queries.grad"] + backward["partials.grad"] + backward["partials.lse.grad"]
        assert returned == expected
        ids = elsewhere(rows_of(case, rank), rank)  # once: each distinct token of a sample, and its weight
        assert forward["keys.ids"] == forward["keys.weights"] == ids
        assert backward["keys.ids"] == backward["keys.weights"] == 0
        known = {"queries", "partials", "partials.lse", "keys.ids", "keys.weights", "header", "sizes"}
        assert set(forward) == known  # keys and values stay; every target slot is taken, so nobody sends how many
        assert forward["sizes"] <= RANKS * RANKS * BATCH


def test_owner_sends_no_weights_where_no_token_repeats(rank_pools: Any) -> None:
    for forward, _ in rank_pools(RANKS).run(count, Case("owner", length=20, distinct=True, queries=True)):
        assert "keys.weights" not in forward
        assert forward["keys.ids"] > 0


def test_every_batch_pays_the_same(rank_pools: Any) -> None:
    for strategy in ("owner", "gather"):
        once = rank_pools(RANKS).run(count, Case(strategy))
        thrice = rank_pools(RANKS).run(count, Case(strategy, calls=3))
        for (one, _), (three, _) in zip(once, thrice, strict=True):
            assert three == {name: 3 * n for name, n in one.items()}


@pytest.mark.parametrize("targets", [False, True])
def test_gather_sends_each_distinct_id_of_a_rank_once_and_its_row_once_back(rank_pools: Any, targets: bool) -> None:
    case = Case("gather", targets=targets)
    results = rank_pools(RANKS).run(count, case)
    forwards, backwards = [f for f, _ in results], [b for _, b in results]
    for rank, forward in enumerate(forwards):
        assert forward["history.ids"] == elsewhere(rows_of(case, rank).unique(), rank)
        assert not {"queries", "partials", "keys.ids"} & set(forward)
    assert total(forwards, "history.rows") == total(forwards, "history.ids") * EMBED
    assert total(backwards, "history.rows.grad") == total(forwards, "history.ids") * EMBED
    assert total(backwards, "history.ids") == 0
    assert total(forwards, "targets.rows") == total(forwards, "targets.ids") * EMBED


def test_positions_sends_every_occurrence(rank_pools: Any) -> None:
    case = Case("positions", targets=False)
    results = rank_pools(RANKS).run(count, case)
    for rank, (forward, _) in enumerate(results):
        assert forward["history.ids"] == elsewhere(batch_of(case, rank)[0].flatten(), rank)
    forwards = [f for f, _ in results]
    assert total(forwards, "history.rows") == total(forwards, "history.ids") * EMBED
    gathered = [f for f, _ in rank_pools(RANKS).run(count, Case("gather", targets=False))]
    assert total(forwards, "history.rows") > 3 * total(gathered, "history.rows")


def counted_and_estimated(case: Case) -> tuple[float, float]:
    """Bytes of payload sent in one forward, and what explain() expects."""
    group = SSPGroup(dist.group.WORLD)
    maps = {name: nn.Linear(EMBED, D) for name in ("query", "key", "value")}
    table = nn.Embedding(case.vocab, EMBED)
    model = TokenizedAttention(
        BATCH, case.length, RANKS, table, group=group, num_heads=HEADS, strategy=case.strategy, **maps
    )
    tokens, lengths = batch_of(case, group.rank)
    targets = torch.randperm(case.vocab)[: BATCH * TARGETS].view(BATCH, TARGETS)
    group.traffic.reset()
    model(tokens, lengths, targets=targets)
    payload = sum(n for name, n in group.traffic.bytes.items() if name not in ("header", "sizes", "target_lengths"))
    explanation = model.explain(tokens, lengths, targets=targets)
    return payload, next(e.bytes_sent for e in explanation.estimates if e.strategy == case.strategy)


@pytest.mark.parametrize("strategy", ["gather", "owner", "positions"])
def test_the_cost_model_expects_what_is_counted(rank_pools: Any, strategy: str) -> None:
    results = rank_pools(RANKS).run(counted_and_estimated, Case(strategy, length=200, vocab=500))
    counted, expected = (sum(x) / RANKS for x in zip(*results, strict=True))
    assert counted == pytest.approx(expected, rel=0.05)
