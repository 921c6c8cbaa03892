"""RFC steps 3 and 4 against plain lists, the two routes against each other, and who owns what."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.embedding import lookup
from ta_plugin.routing import BoundedRoute, HashOwners, Owners, PermutedRows, Route, rfc_positions

LENGTH, VOCAB = 7, 11
Samples = list[list[int]]
GENERATE = [Phase.explicit, Phase.generate]  # a failure restarts the ranks: too slow to shrink


def batch_of(rank: int, seed: int, batch: int) -> Samples:
    draw = random.Random(f"{seed}/{rank}")
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(0, LENGTH))] for _ in range(batch)]


def space_of(samples: Samples) -> UniqueSpace:
    tokens = torch.tensor([s + [0] * (LENGTH - len(s)) for s in samples], dtype=torch.int64).view(len(samples), LENGTH)
    return UniqueSpace.from_padded(tokens, torch.tensor([len(s) for s in samples], dtype=torch.int64))


def occurrences_of(space: UniqueSpace, rank: int, batch: int) -> tuple[Tensor, Tensor]:
    """Every occurrence's token and RFC position."""
    positions = rfc_positions(space.positions(), space.sample_of_occurrences(), rank, batch, LENGTH)
    return space.tokens[space.inverse], positions


def owner_of(token: int, owners: Owners) -> int:
    return int(owners.owner_of(torch.tensor([token])))


def rfc_lists(everybody: list[Samples], owners: Owners, batch: int) -> tuple[Any, Any, Any]:
    """Steps 3 and 4 in lists: rankwise tokens, positions and sizes of each rank."""
    n = len(everybody)
    tokens: Any = [[[] for _ in range(n)] for _ in range(n)]  # [source][owner]
    positions: Any = [[[] for _ in range(n)] for _ in range(n)]
    sizes: Any = [[[0] * len(everybody[r]) for _ in range(n)] for r in range(n)]  # [source][owner][sample]
    for rank, samples in enumerate(everybody):
        for b, sample in enumerate(samples):
            for i, token in enumerate(sample):
                to = owner_of(token, owners)
                tokens[rank][to].append(token)
                positions[rank][to].append((rank * batch + b) * LENGTH + i)
                sizes[rank][to][b] += 1
    return tokens, positions, sizes


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def owners_by_name(name: str, ranks: int) -> Owners:
    return HashOwners(ranks) if name == "hash" else PermutedRows(VOCAB, ranks)


def check_rfc_steps(seed: int, batches: list[int], owners_name: str) -> None:
    group = SSPGroup(dist.group.WORLD if dist.is_initialized() else None)
    me, n = group.rank, group.size
    owners = owners_by_name(owners_name, n)
    everybody = [batch_of(r, seed, batches[r]) for r in range(n)]
    tokens, positions, sizes = rfc_lists(everybody, owners, batches[0])
    space = space_of(everybody[me])
    my_tokens, my_positions = occurrences_of(space, me, batches[0])
    route = Route.build(owners.owner_of(my_tokens), space.cu_occurrences, batches, group)

    assert my_tokens[route.order].tolist() == flat(tokens[me])
    assert my_positions[route.order].tolist() == flat(positions[me])
    assert route.rankwise_sizes.tolist() == sizes[me]
    assert route.send == [len(t) for t in tokens[me]]
    assert route.receive == [len(tokens[source][me]) for source in range(n)]
    received = route.to_owners(my_tokens, "tokens")
    assert received.tolist() == flat(tokens[source][me] for source in range(n))
    assert route.to_owners(my_positions, "positions").tolist() == flat(positions[source][me] for source in range(n))
    per_sample = [size for source in range(n) for size in sizes[source][me]]
    assert route.received_cu_seqlens.dtype == torch.int32
    assert route.received_cu_seqlens.diff().tolist() == per_sample
    assert torch.equal(route.to_readers(received, "back"), my_tokens)  # the way back


def check_both_routes(seed: int, batch: int, owners_name: str) -> None:
    """Every occurrence deduplicated at its owner, and distinct tokens from the start: the same owner, the same results."""
    group = SSPGroup(dist.group.WORLD if dist.is_initialized() else None)
    batches = [batch] * group.size
    owners = owners_by_name(owners_name, group.size)
    space = space_of(batch_of(group.rank, seed, batch))
    tokens, _ = occurrences_of(space, group.rank, batch)
    by_occurrence = Route.build(owners.owner_of(tokens), space.cu_occurrences, batches, group)
    by_row = Route.build(owners.owner_of(space.tokens), space.cu_seqlens, batches, group)

    owned = UniqueSpace.from_packed(by_occurrence.to_owners(tokens, "t"), by_occurrence.received_cu_seqlens)
    assert torch.equal(owned.tokens, by_row.to_owners(space.tokens, "t"))
    assert torch.equal(owned.counts, by_row.to_owners(space.counts, "c"))
    assert torch.equal(owned.cu_seqlens, by_row.received_cu_seqlens)

    bias = torch.randn(tokens.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at_owner = owned.fold_bias(by_occurrence.to_owners(bias, "b"))
    assert torch.equal(at_owner, by_row.to_owners(space.as_packed().fold_bias(bias), "b"))

    weights = torch.randn(tokens.numel(), 3, generator=torch.Generator().manual_seed(group.rank), dtype=torch.float64)
    rows, grads = [], []
    for route, sent in ((by_occurrence, tokens), (by_row, space.tokens)):
        table = nn.Embedding(VOCAB, 3, dtype=torch.float64)
        table.weight.data = torch.arange(3.0 * VOCAB, dtype=torch.float64).view(VOCAB, 3).sin()
        fetched = lookup(sent, route, table, "x")
        assert torch.equal(fetched, table.weight[sent])
        rows.append(fetched if route is by_occurrence else space.as_packed().expand(fetched))
        (rows[-1] * weights).sum().backward()
        grads.append(table.weight.grad)
    assert torch.equal(rows[0], rows[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)  # sums of the same terms in another order


def check_gradient_returns_to_its_row(seed: int) -> None:
    group = SSPGroup(dist.group.WORLD)
    owners, batches = HashOwners(group.size), [3] * group.size
    space = space_of(batch_of(group.rank, seed, 3))
    route = Route.build(owners.owner_of(space.tokens), space.cu_seqlens, batches, group)
    values = torch.randn(space.num_rows, 2, dtype=torch.float64, requires_grad=True)
    back = route.to_readers(route.to_owners(values, "there"), "back")
    assert torch.equal(back, values)
    coefficients = torch.randn_like(values)
    (back * coefficients).sum().backward()
    assert torch.equal(values.grad, coefficients)


def check_bounded_route(last_id: int, kind: str) -> None:
    """Items go around: the first of each sample to the next rank, the rest to this one; one more lies behind the samples."""
    group = SSPGroup(dist.group.WORLD)
    me, n = group.rank, group.size
    following = (me + 1) % n
    owner = torch.tensor([following, me, me, following, me, 0])
    ids = torch.arange(6) + 10 * me
    weights = ids.clone() if kind == "counts" else ids.float() / 8
    if kind == "gradient":
        weights = weights.requires_grad_()
    route = BoundedRoute.build(owner, torch.tensor([0, 3, 5], dtype=torch.int32), 4, group)
    sizes, tokens, there = route.send(ids, weights, "keys", last_id).arrive()
    assert route.most.tolist() == [3]
    assert tokens.dtype == (torch.int32 if last_id < 2**31 else torch.int64)
    assert there.dtype == (torch.int32 if kind == "counts" else torch.float32)
    for source in range(n):
        wanted = {me: [1, 2, 4], (me - 1) % n: [0, 3]}.get(source, [])
        assert sizes[source].tolist() == {3: [2, 1], 2: [1, 1], 0: [0, 0]}[len(wanted)]
        assert tokens[source, : len(wanted)].tolist() == [i + 10 * source for i in wanted]
        expected = torch.tensor(wanted, dtype=torch.int64) + 10 * source
        assert torch.equal(there[source, : len(wanted)].double() * (1 if kind == "counts" else 8), expected.double())
    if kind == "gradient":
        coefficients = torch.zeros_like(there)
        coefficients[me, :3], coefficients[(me - 1) % n, :2] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 16.0])
        (there * coefficients).sum().backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None and weights.grad.tolist() == [8, 1, 2, 16, 4, 0]


@pytest.mark.parametrize("kind", ["counts", "folded", "gradient"])
@pytest.mark.parametrize("last_id", [100, 2**31 - 1, 2**31])
def test_bounded_routes_send_ids_as_narrow_as_they_are(rank_pools: Any, last_id: int, kind: str) -> None:
    rank_pools(2).run(check_bounded_route, last_id, kind)


@pytest.mark.parametrize("owners", ["hash", "permuted"])
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), batch=st.integers(0, 4))
def test_one_rank_routes_to_itself(owners: str, seed: int, batch: int) -> None:
    check_rfc_steps(seed, [batch], owners)
    check_both_routes(seed, batch, owners)


@pytest.mark.parametrize("ranks", [2, 4])
def test_rfc_steps_three_and_four(rank_pools: Any, ranks: int) -> None:
    @settings(max_examples=6, phases=GENERATE, report_multiple_bugs=False)
    @given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["hash", "permuted"]))
    def on_every_rank(seed: int, batch: int, owners: str) -> None:
        rank_pools(ranks).run(check_rfc_steps, seed, [batch] * ranks, owners)

    on_every_rank()


def test_batch_sizes_may_differ_between_ranks(rank_pools: Any) -> None:
    rank_pools(4).run(check_rfc_steps, 1, [2, 0, 5, 1], "hash")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_occurrence_route_and_the_deduplicated_route_agree(rank_pools: Any, ranks: int) -> None:
    @settings(max_examples=6, phases=GENERATE, report_multiple_bugs=False)
    @given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["hash", "permuted"]))
    def on_every_rank(seed: int, batch: int, owners: str) -> None:
        rank_pools(ranks).run(check_both_routes, seed, batch, owners)

    on_every_rank()


def test_gradients_take_the_way_back(rank_pools: Any) -> None:
    rank_pools(4).run(check_gradient_returns_to_its_row, 3)


def test_positions_beyond_int32_stay_exact() -> None:
    rank, batch, length = 7, 100_000, 200_000
    samples, places = torch.tensor([0, 99_999]), torch.tensor([3, 199_999])
    positions = rfc_positions(places, samples, rank, batch, length)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [7 * 100_000 * 200_000 + 3, (7 * 100_000 + 99_999) * 200_000 + 199_999]
    assert positions.min() > 2**31
    assert (positions % length).tolist() == places.tolist()


@given(st.one_of(st.integers(1, 300), st.integers(1, 100_000)), st.integers(1, 9))
def test_permuted_rows_are_a_bijection_and_fill_their_shards(vocab: int, ranks: int) -> None:
    owners, ids = PermutedRows(vocab, ranks), torch.arange(vocab)
    rows = owners.permute(ids)
    assert torch.equal(rows.sort().values, ids)
    assert torch.equal(owners.ids_of_rows(rows), ids)
    assert int(owners.owner_of(ids).max()) < ranks
    held = []
    for rank in range(ranks):
        first, last = owners.shard(rank)
        mine = owners.owner_of(ids) == rank
        local = owners.local_row(ids, rank, other=-7)
        assert torch.equal(first + local[mine], rows[mine]) and bool((local[~mine] == -7).all())
        held += range(first, last)
    assert held == list(range(vocab))
    assert owners.owner_of(torch.tensor([-1, vocab, vocab + 1, -vocab])).tolist() == [-1] * 4
    assert torch.equal(PermutedRows(vocab, ranks + 1).permute(ids), rows)  # whatever the number of ranks


@pytest.mark.parametrize("vocab", [10**6 + 3, 2**31 + 11, 3_037_000_499])
def test_large_vocabularies_permute_without_overflow(vocab: int) -> None:
    owners = PermutedRows(vocab, 8)
    ids = torch.tensor([0, 1, 2, vocab // 2, vocab - 2, vocab - 1])
    assert owners.permute(ids).tolist() == [i * owners.multiplier % vocab for i in ids.tolist()]
    assert torch.equal(owners.ids_of_rows(owners.permute(ids)), ids)


@pytest.mark.parametrize("vocab", [0, -1, 3_037_000_500])
def test_a_vocabulary_that_would_overflow_is_refused(vocab: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size is {vocab}; a permuted table holds"):
        PermutedRows(vocab, 2)


def zipf_batch(samples: int, length: int, vocab: int) -> list[Tensor]:
    """Distinct ids of each sample, drawn by Zipf(1.05), the most frequent first in the vocabulary."""
    weights = torch.arange(1, vocab + 1, dtype=torch.float64).pow(-1.05)
    generator = torch.Generator().manual_seed(0)
    return [torch.multinomial(weights, length, True, generator=generator).unique() for _ in range(samples)]


@pytest.mark.parametrize(("ranks", "most"), [(8, 1.08), (64, 1.35)])
@pytest.mark.parametrize("owners", ["permuted", "hash"])
def test_ownership_balances_under_zipf(owners: str, ranks: int, most: float) -> None:
    vocab = 100_000
    rows = torch.cat(zipf_batch(64, 4096, vocab))
    chosen: Owners = PermutedRows(vocab, ranks) if owners == "permuted" else HashOwners(ranks)
    loads = torch.bincount(chosen.owner_of(rows), minlength=ranks).double()
    assert float(loads.max() / loads.mean()) < most


@given(st.integers(1, 70))
def test_hash_owners_cover_any_id(ranks: int) -> None:
    ids = torch.tensor([0, 1, 2**31, 2**62, 2**63 - 2])
    owner = HashOwners(ranks).owner_of(ids)
    assert int(owner.min()) >= 0
    assert int(owner.max()) < ranks


@pytest.mark.parametrize("stride", [1, 8, 64, 2**20, 2**40])
def test_hash_owners_balance_any_arithmetic_sequence(stride: int) -> None:
    loads = torch.bincount(HashOwners(8).owner_of(torch.arange(40_000) * stride), minlength=8).double()
    assert float(loads.max() / loads.mean()) < 1.06  # five standard deviations
