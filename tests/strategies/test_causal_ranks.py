"""Causal attention over ranks against plain causal attention over the joined pieces, outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracle import attention_over_positions
from torch import Tensor

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, causal_over_ranks, pieces_of, zigzag

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 4


@dataclass(frozen=True)
class Case:
    seed: int
    ranks: int = 1
    batch: int = 2
    longest: int = 5
    vocab: int = 6
    contiguous: bool = False
    chunk: int = 2
    distinct: bool = False
    decay: bool = False
    empty_places: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[int, ...]]:
        return [(r,) for r in range(self.ranks)] if self.contiguous else zigzag(self.ranks)


def piece(case: Case, place: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, longest), lengths (B,), queries (B, longest, H, D) of the piece at a place in the sequence."""
    g = torch.Generator().manual_seed(100 * case.seed + place)
    shape = (case.batch, case.longest)
    tokens = torch.randint(0, case.vocab, shape, generator=g)
    if case.distinct:
        tokens = torch.arange(case.longest).expand(shape) + place * case.longest
    lengths = torch.randint(0, case.longest + 1, shape[:1], generator=g)
    if place in case.empty_places:
        lengths.zero_()
    return tokens, lengths, torch.randn(*shape, HEADS, HEAD_DIM, generator=g, dtype=torch.float64)


def table_of(case: Case) -> Tensor:
    g = torch.Generator().manual_seed(case.seed)
    return torch.randn(max(case.vocab, 100), 2, KV_HEADS, HEAD_DIM, generator=g, dtype=torch.float64).requires_grad_()


def decay_of(case: Case) -> Tensor | None:
    return torch.tensor([0.5, 0.1, 2.0, 0.0], dtype=torch.float64, requires_grad=True) if case.decay else None


def plain(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Causal attention over positions; with decay one query at a time, whose biases are its own."""
    if decay is None:
        return attention_over_positions(q, k, v, visible=torch.ones(len(q), len(q), dtype=torch.bool).tril())
    rows = [q.new_zeros(0, HEADS, HEAD_DIM)]
    for i in range(len(q)):
        bias = (torch.arange(i + 1) - i)[:, None] * decay
        rows.append(attention_over_positions(q[i : i + 1], k[: i + 1], v[: i + 1], bias=bias))
    return torch.cat(rows)


def check(case: Case) -> None:
    group = SSPGroup(dist.group.WORLD if case.ranks > 1 else None)
    places = case.places
    pieces = [piece(case, p) for p in range(sum(len(p) for p in places))]
    queries = [q.clone().requires_grad_() for _, _, q in pieces]
    table, decay, expected = table_of(case), decay_of(case), {}
    loss = table.sum() * 0 + sum(x.sum() * 0 for x in queries)
    for b in range(case.batch):
        sizes = [int(n[b]) for _, n, _ in pieces]
        keys = table[torch.cat([t[b, :n] for (t, _, _), n in zip(pieces, sizes, strict=True)])]
        q = torch.cat([x[b, :n] for x, n in zip(queries, sizes, strict=True)])
        out = plain(q, keys[:, 0], keys[:, 1], decay)
        loss = loss + out.sin().sum()
        expected |= {(place, b): x for place, x in enumerate(out.split(sizes))}
    (loss + (0 if decay is None else decay.sum() * 0)).backward()

    mine = places[group.rank]
    tokens, lengths = (torch.stack([pieces[p][i] for p in mine], 1) for i in (0, 1))
    reader = pieces_of(tokens, lengths)
    q = torch.cat([pieces[p][2] for p in mine]).clone().requires_grad_()  # (P * B, L, H, D)
    own, slopes = table_of(case), decay_of(case)
    for _ in range(2):
        q.grad = own.grad = None
        if slopes is not None:
            slopes.grad = None
        plan = CausalRows.of(reader, HashOwners(group.size), group, places)
        k, v = own[plan.owned.space.tokens].unbind(1)
        out, lse = causal_over_ranks(plan, reader.pack(q), k, v, decay=slopes, chunk=case.chunk)
        assert lse.shape == out.shape[:2]
        torch.testing.assert_close(
            out, torch.cat([expected[p, b] for p in mine for b in range(case.batch)]), rtol=0, atol=1e-10
        )
        (out.sin().sum() + own.sum() * 0).backward()
        for mine_of_it, whole in ((own, table), (slopes, decay)):
            if mine_of_it is not None and whole is not None:
                total = mine_of_it.grad.clone()
                if case.ranks > 1:
                    dist.all_reduce(total)
                torch.testing.assert_close(total, whole.grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(q.grad, torch.cat([queries[p].grad for p in mine]), rtol=0, atol=1e-10)


@st.composite
def cases(draw: Any, ranks: int) -> Case:
    places = 2 * ranks
    return Case(
        seed=draw(st.integers(0, 10**6)),
        ranks=ranks,
        batch=draw(st.integers(1, 3)),
        longest=draw(st.integers(1, 6)),
        vocab=draw(st.sampled_from([1, 4, 40])),
        contiguous=draw(st.booleans()),
        decay=draw(st.booleans()),
        chunk=draw(st.integers(1, 4)),
        empty_places=tuple(draw(st.sets(st.integers(0, places - 1)))),
    )


@hypothesis_settings(max_examples=15)
@given(cases(1))
def test_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_plain_causal_attention_over_joined_pieces(rank_pools: Any, ranks: int) -> None:
    @hypothesis_settings(max_examples=12)
    @given(cases(ranks))
    def on_every_rank(case: Case) -> None:
        rank_pools(ranks).run(check, case)

    on_every_rank()
    case = Case(seed=1, ranks=ranks)
    for corner in ({"vocab": 1}, {"distinct": True}, {"empty_places": tuple(range(2 * ranks))}):
        for decay in (False, True):
            rank_pools(ranks).run(check, replace(case, decay=decay, **corner))


def sent(length: int) -> tuple[dict[str, int], int]:
    group = SSPGroup(dist.group.WORLD)
    g = torch.Generator().manual_seed(group.rank)
    reader = pieces_of(torch.randint(0, 30, (2, 2, length), generator=g), torch.full((2, 2), length))
    plan = CausalRows.of(reader, HashOwners(group.size), group)
    rows = torch.randn(plan.owned.space.num_rows, KV_HEADS, HEAD_DIM, requires_grad=True)
    out, _ = causal_over_ranks(plan, torch.randn(reader.num_occurrences, HEADS, HEAD_DIM), rows, rows)
    out.sum().backward()
    return dict(group.traffic.elements), plan.owned.space.num_rows


def test_a_causal_layer_sends_distinct_rows_whatever_the_length(rank_pools: Any) -> None:
    for length in (100, 400):
        results = rank_pools(4).run(sent, length)
        rows = [u for _, u in results]
        assert sum(rows) == 2 * 30
        for traffic, mine in results:
            width = KV_HEADS * HEAD_DIM
            assert traffic["causal.keys"] == traffic["causal.values"] == 3 * mine * width
            assert traffic["causal.keys.grad"] == traffic["causal.values.grad"] == (sum(rows) - mine) * width
            assert traffic["causal.counts"] == 3 * mine * 2  # once per batch: a number per row and piece


def failures() -> list[str]:
    group, messages = SSPGroup(dist.group.WORLD), []
    for samples, places in ((2, [(0, 1), (1, 2)]), (1, None), (2 + 2 * group.rank, None)):
        reader = UniqueSpace.from_padded(torch.zeros(samples, 3, dtype=torch.int64), torch.full((samples,), 3))
        try:
            CausalRows.of(reader, HashOwners(2), group, places if group.rank == 1 else None)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_is_wrong_on_one_rank_raises_on_both(rank_pools: Any) -> None:
    first, second = rank_pools(2).run(failures)
    assert first == second
    assert "rank 1 of 2: places are [(0, 1), (1, 2)]; pass 2 lists" in first[0]
    assert "reader has 1 samples; pass every sample's 2 pieces" in first[1]
    assert "ranks differ in samples or places" in first[2]


def test_places_hold_at_least_one_piece() -> None:
    with pytest.raises(ValueError, match=r"places are \[\(\)\]; pass 1 lists of equal length"):
        CausalRows.of(
            pieces_of(torch.zeros(1, 2, 3, dtype=torch.int64), torch.full((1, 2), 3)),
            HashOwners(1),
            SSPGroup(None),
            [()],
        )


def test_zigzag_balances_prefixes() -> None:
    assert zigzag(4) == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert {sum(places) for places in zigzag(8)} == {15}
