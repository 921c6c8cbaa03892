"""What a layer sends in layout "sequence": its distinct rows times 2 D per hop, whatever the length."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention, UniqueSpace
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import OwnedRows, Rates, ring_attention, row_attention

RANKS, BATCH, EMBED, HEADS, HEAD_DIM, VOCAB = 4, 3, 8, 2, 4, 40
D = HEADS * HEAD_DIM
RING, GATHER = Rates(1e9, 1e9, hop_seconds=0.0), Rates(1e9, 1e9, hop_seconds=1e9)


def chunk(rank: int, length: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randint(0, VOCAB, (BATCH, length), generator=g), torch.full((BATCH,), length)


def distinct_rows(length: int) -> list[int]:
    """How many rows each rank owns: distinct (sample, token) pairs over all chunks."""
    joined = torch.cat([chunk(r, length)[0] for r in range(RANKS)], 1)
    tokens = UniqueSpace.from_padded(joined, torch.full((BATCH,), joined.shape[1])).tokens
    return torch.bincount(HashOwners(RANKS).owner_of(tokens), minlength=RANKS).tolist()


def elsewhere(rank: int, length: int) -> int:
    tokens = UniqueSpace.from_padded(*chunk(rank, length)).tokens
    return int((HashOwners(RANKS).owner_of(tokens) != rank).sum())


def count(length: int, rates: Rates, layers: int) -> tuple[Counter[str], Counter[str]]:
    """Elements this rank sent forward and backward; `layers` of attention in encode, and one more."""
    group = SSPGroup(dist.group.WORLD)
    maps = {name: nn.Linear(EMBED, D) for name in ("query", "key", "value")}
    model = TokenizedAttention(
        BATCH, length, RANKS, nn.Embedding(VOCAB, EMBED), group=group, num_heads=HEADS, layout="sequence", rates=rates,
        output=nn.Linear(D, 5), **maps,
    )  # fmt: skip

    def encode(rows: Tensor, space: OwnedRows) -> Tensor:
        for _ in range(layers):
            heads = rows.unflatten(1, (HEADS, HEAD_DIM))
            rows = row_attention(space, heads, heads, heads).flatten(1)
        return rows

    group.traffic.reset()
    out = model(*chunk(group.rank, length), encode=encode)
    forward = Counter(group.traffic.elements)
    out.sum().backward()
    backward = Counter(group.traffic.elements)
    backward.subtract(forward)
    return forward, backward


def total(counters: list[Counter[str]], names: tuple[str, ...]) -> int:
    return sum(c[name] for c in counters for name in names)


@pytest.mark.parametrize("rates", [RING, GATHER], ids=["ring", "all_gather"])
@pytest.mark.parametrize("length", [5, 100, 1000])
def test_a_layer_sends_its_distinct_rows_times_2d_per_hop(rank_pools: Any, length: int, rates: Rates) -> None:
    rows = distinct_rows(length)
    assert length < 100 or sum(rows) == BATCH * VOCAB  # from there on longer samples have no more distinct tokens
    results = rank_pools(RANKS).run(count, length, rates, 2)
    forwards, backwards = [f for f, _ in results], [b for _, b in results]
    per_layer = (RANKS - 1) * sum(rows) * 2 * D
    assert total(forwards, ("ring.keys", "ring.values")) == 3 * per_layer
    assert total(backwards, ("ring.keys.grad", "ring.values.grad")) == 3 * per_layer
    # once per batch: ids and counts to owners, counts to all, and one row back to each reader of a token
    away = [elsewhere(rank, length) for rank in range(RANKS)]
    assert [f["shared.ids"] for f in forwards] == [f["shared.counts"] for f in forwards] == away
    assert total(forwards, ("shared.every_count",)) == (RANKS - 1) * sum(rows)
    assert total(forwards, ("rows",)) == total(backwards, ("rows.grad",)) == sum(away) * 5
    known = {"header", "sizes", "shared.ids", "shared.counts", "shared.bounds", "shared.every_count", "rows"}
    assert set(forwards[0]) == known | {"ring.keys", "ring.values"}


def counted_and_estimated(length: int) -> tuple[float, float, str]:
    group = SSPGroup(dist.group.WORLD)
    maps = {name: nn.Linear(EMBED, D) for name in ("query", "key", "value")}
    table = nn.Embedding(VOCAB, EMBED)
    model = TokenizedAttention(BATCH, length, RANKS, table, group=group, num_heads=HEADS, layout="sequence", **maps)
    group.traffic.reset()
    model(*chunk(group.rank, length))
    small = ("header", "sizes", "shared.bounds")
    payload = sum(n for name, n in group.traffic.bytes.items() if name not in small)
    explanation = model.explain(*chunk(group.rank, length))
    plain, ring = explanation.estimates
    assert (plain.strategy, ring.strategy, explanation.chosen) == ("positions", "ring", "ring")
    assert plain.bytes_sent > 5 * ring.bytes_sent
    assert plain.flops > 10 * ring.flops
    return payload, ring.bytes_sent, str(explanation)


def test_the_cost_model_expects_what_is_counted(rank_pools: Any) -> None:
    results = rank_pools(RANKS).run(counted_and_estimated, 300)
    counted, expected = (sum(r[i] for r in results) / RANKS for i in (0, 1))  # type: ignore[misc]
    assert counted == pytest.approx(expected, rel=0.05)
    assert "-> ring" in results[0][2]
    assert "self-attention runs on owned rows" in results[0][2]


def both_ways(seed: int) -> None:
    """Ring and all-gather: the same results and gradients."""
    group = SSPGroup(dist.group.WORLD)
    space = UniqueSpace.from_padded(*chunk(group.rank, 20))
    owned = OwnedRows.of(space, HashOwners(RANKS), group)
    g = torch.Generator().manual_seed(seed + group.rank)
    shape = (owned.space.num_rows, HEADS, HEAD_DIM)
    found = []
    rows = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    for exchange in ("ring", "all_gather"):
        q, k, v = (x.clone().requires_grad_() for x in rows)
        out, lse = ring_attention(owned, q, k, v, exchange=exchange)  # type: ignore[arg-type]
        assert lse is not None
        (out.square().sum() + lse.sin().sum()).backward()
        found.append((out, lse, q.grad, k.grad, v.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_ring_and_all_gather_agree(rank_pools: Any) -> None:
    rank_pools(RANKS).run(both_ways, 3)
