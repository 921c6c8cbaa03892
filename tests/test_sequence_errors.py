"""Layout "sequence" when something is wrong on one rank, or NaN in one row; and positions beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ta_plugin import SSPGroup, TokenizedAttention, UniqueSpace
from ta_plugin.attention import self_attention
from ta_plugin.routing import HashOwners, rfc_positions
from ta_plugin.strategies import OwnedRows, Rates, row_attention
from ta_plugin.strategies.owner import chunk_offsets

VOCAB, EMBED, BATCH, CULPRIT, POISON = 12, 8, 3, 1, 11


def model(width: int, table: nn.Embedding, rates: Rates | None = None, **options: Any) -> TokenizedAttention:
    torch.manual_seed(0)
    maps = {name: nn.Linear(EMBED, EMBED) for name in ("query", "key", "value")}
    ranks = dist.get_world_size()
    return TokenizedAttention(
        BATCH, width, ranks, table, num_heads=2, layout="sequence", rates=rates, **maps, **options
    )


def failure_of(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError")


def self_attention_failures() -> list[str]:
    """Chunks of width 4 + rank; then a good batch, on the same group."""
    rank, messages = dist.get_rank(), []
    attention = model(4 + rank, nn.Embedding(VOCAB, EMBED))
    for change in ("negative id", "width", "bias"):
        tokens, lengths, options = torch.zeros(BATCH, 4 + rank, dtype=torch.int64), torch.full((BATCH,), 4), {}
        if rank == CULPRIT and change == "negative id":
            tokens[1, 2] = -5
        if rank == CULPRIT and change == "width":
            tokens = tokens[:, :-1]
        if rank == CULPRIT and change == "bias":
            options["bias"] = torch.zeros(BATCH, 4 + rank)
        messages.append(failure_of(lambda t=tokens, n=lengths, o=options: attention(t, n, **o)))
    messages.append(failure_of(lambda: attention.regroup(dist.group.WORLD, "stripes" if rank == CULPRIT else None)))
    attention.layout = "sequence"
    out = attention(torch.zeros(BATCH, 4 + rank, dtype=torch.int64), torch.full((BATCH,), 4))
    out.sum().backward()
    assert torch.isfinite(out).all()
    return messages


def test_a_bad_chunk_raises_on_every_rank(rank_pools: Any) -> None:
    results = rank_pools(2).run(self_attention_failures)
    assert results[0] == results[1]
    negative, width, bias, layout = results[0]
    assert "rank 1 of 2: tokens[1, 2] is -5" in negative
    assert "rank 1 of 2: tokens has shape (3, 4), but batch_size and sequence_length are (3, 5)" in width
    assert "bias differs between rank 0 and rank 1" in bias
    assert "rank 1 of 2: layout is 'stripes'" in layout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_multiple": 8}, "row_multiple is 8 in layout 'sequence'"),
        ({"strategy": "gather"}, "strategy is 'gather' in layout 'sequence'"),
    ],
)
def test_options_of_the_other_layout_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizedAttention(BATCH, 4, 1, nn.Embedding(VOCAB, EMBED), layout="sequence", **options)


def spread_of_nan(circulate: bool) -> None:
    """Rank 1's chunk of sample 1 holds the poisoned token; samples 0 and 2 stay clean on every rank."""
    rank, rates = dist.get_rank(), Rates(1e9, 1e9, hop_seconds=0.0 if circulate else 1e9)
    tokens = torch.randint(0, 8, (BATCH, 6), generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        tokens[1] = torch.tensor([8, POISON, 9, POISON, 10, 8])
    tokens[2, 4:] = POISON  # past its length
    runs = []
    for poison in (False, True):
        torch.manual_seed(1)
        table = nn.Embedding(VOCAB, EMBED)
        if poison:
            table.weight.data[POISON] = torch.nan
        out = model(6, table, rates)(tokens, torch.tensor([6, 6, 4]))
        out.square().sum().backward()
        grad = torch.zeros_like(table.weight) if table.weight.grad is None else table.weight.grad
        dist.all_reduce(grad)
        runs.append((out.detach(), grad))
    (clean, _), (out, grad) = runs
    assert torch.isnan(out[1]).all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert torch.isnan(grad[[8, 9]]).all()  # tokens of the poisoned sample alone


@pytest.mark.parametrize("circulate", [True, False], ids=["ring", "all_gather"])
def test_a_nan_embedding_reaches_only_samples_that_hold_its_token(rank_pools: Any, circulate: bool) -> None:
    rank_pools(2).run(spread_of_nan, circulate)


def far_out() -> tuple[list[int], list[int]]:
    """Positions and counts of chunks of 2**39 occurrences each, of which only the sizes exist."""
    group, long = SSPGroup(dist.group.WORLD), 2**39
    offsets, totals = chunk_offsets(torch.tensor([long, 3]), group)
    samples = torch.tensor([0, 0, 1])
    places = torch.tensor([0, long - 1, 2]) + offsets[samples]
    positions = rfc_positions(places, samples, 0, 2, int(totals.max()))
    chunk = UniqueSpace.from_packed(torch.tensor([5, 6, 5]), torch.tensor([0, 2, 3]))
    object.__setattr__(chunk, "counts", torch.tensor([long, 1, 7]))
    owned = OwnedRows.of(chunk, HashOwners(group.size), group)
    return positions.tolist(), owned.space.counts.tolist()


def test_index_arithmetic_holds_two_to_the_40_occurrences(rank_pools: Any) -> None:
    (first, counts), (second, others) = rank_pools(2).run(far_out)
    total = 2**40
    assert first == [0, total // 2 - 1, total + 2]
    assert second == [total // 2, total - 1, total + 5]
    assert sorted(counts + others) == [2, 14, total]  # exact, where float32 has 24 bits


def test_documents_of_one_packed_sequence_are_samples(rank_pools: Any) -> None:
    rank_pools(2).run(packed_documents)


def packed_documents() -> None:
    """A packed stream of documents, cut in the middle of one: each rank packs what it reads of each document."""
    group, g = SSPGroup(dist.group.WORLD), torch.Generator().manual_seed(3)
    bounds, stream = torch.tensor([0, 5, 5, 12, 13, 20]), torch.randint(0, 6, (20,), generator=g)
    whole = UniqueSpace.from_packed(stream, bounds)
    table = torch.randn(6, 3, 2, 4, generator=g, dtype=torch.float64)
    expected = whole.expand(self_attention(whole, *table[whole.tokens].unbind(1)))
    cut = [0, 9, 20]
    first, last = cut[group.rank], cut[group.rank + 1]
    mine = UniqueSpace.from_packed(stream[first:last], (bounds - first).clamp(0, last - first))
    owned = OwnedRows.of(mine, HashOwners(group.size), group)
    out = owned.to_positions(row_attention(owned, *table[owned.space.tokens].unbind(1)))
    torch.testing.assert_close(out, expected[first:last], rtol=0, atol=1e-12)
