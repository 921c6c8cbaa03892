"""Compiled distinct tokens, owners and partition against their torch forms and plain Python, on every device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin import UniqueSpace
from ta_plugin.ops import Segments
from ta_plugin.routing import HashOwners, PermutedRows

Ops = Callable[[str], Any]
ids = st.one_of(st.integers(0, 3), st.integers(0, 2**62), st.sampled_from([2**62, 2**62 - 1, 2**63 - 2, 0]))
batches = st.lists(st.lists(ids, max_size=12), max_size=6)
NAMES = ("distinct", "cu_seqlens", "counts", "cu_occurrences", "inverse", "order", "offsets", "slots", "sizes")


def zipf(samples: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """(samples, length) ids whose frequencies fall like 1 / rank, spread over 62 bits."""
    g = torch.Generator().manual_seed(seed)
    ranks = (vocab ** torch.rand(samples, length, generator=g, dtype=torch.float64)).long() - 1
    return ranks * 1099511627689 % 2**62


def kinds(length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Padded batches of one length: tokens (B, L), lengths (B,)."""
    full = torch.full((3,), length)
    return {
        "zipf": (zipf(3, length, 5 * length + 1), torch.tensor([length, max(length - 7, 0), 0])),
        "one hot token": (torch.full((3, length), 2**62), full),
        "all distinct": (torch.arange(3 * length).view(3, length) * 3, full),
        "rows of 32 and 33": (torch.arange(3 * length).view(3, length) // torch.tensor([[32], [33], [2]]), full),
        "none": (zipf(3, length, 9), torch.zeros(3, dtype=torch.int64)),
    }


def trimmed(found: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What was found, without the room to spare behind it."""
    by_name = dict(zip(NAMES, (x.cpu() for x in found), strict=True))
    members, rows = by_name["sizes"][:2].tolist()
    ends = {
        "distinct": rows,
        "counts": rows,
        "offsets": rows + 1,
        "inverse": members,
        "order": members,
        "slots": members,
    }
    return {name: x[: ends.get(name, x.numel())] for name, x in by_name.items()}


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for (name, got), want in zip(trimmed(ours).items(), trimmed(expected).values(), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), name


def check(compiled: Ops, plain: Ops, device: str, tokens: Tensor, extents: Tensor) -> tuple[Tensor, ...]:
    """What the compiled operator finds, right in both forms; and grouped afterwards, as with the rows."""
    expected = plain("unique")(tokens, extents, -1)
    tokens, extents = tokens.to(device), extents.to(device)
    found = compiled("unique")(tokens, extents, -1)
    same(found, expected)
    rows = compiled("unique")(tokens, extents, -1, False)
    assert rows[5].numel() == rows[6].numel() == 0
    later = trimmed(rows)
    later["order"], later["offsets"] = (
        x.cpu() for x in compiled("group")(later["inverse"].to(device), later["counts"].to(device))
    )
    for (name, got), want in zip(later.items(), trimmed(expected).values(), strict=True):
        assert torch.equal(got, want), f"{name}, grouped afterwards"
    return found


@given(batches, st.integers(0, 3), st.booleans())
def test_compiled_equals_plain_torch(
    device: str, compiled: Ops, plain: Ops, samples: list[list[int]], extra: int, packed: bool
) -> None:
    lengths = torch.tensor([len(s) for s in samples], dtype=torch.int64)
    width = int(lengths.max()) + extra if samples else extra
    if packed:
        tokens = torch.tensor([t for s in samples for t in s], dtype=torch.int64)
        extents = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    else:
        tokens = torch.tensor([s + [s[0] if s else 1] * (width - len(s)) for s in samples], dtype=torch.int64)
        tokens, extents = tokens.view(len(samples), width), lengths
    check(compiled, plain, device, tokens, extents)


# at and beside the edges of what a block of each size holds, and beyond all of them
@pytest.mark.parametrize("length", [0, 1, 31, 33, 1000, 1024, 1025, 4096, 4097, 16384, 16390, 100_000])
def test_lengths_around_a_block(device: str, compiled: Ops, plain: Ops, length: int) -> None:
    for name, (tokens, lengths) in kinds(length).items():
        ours = check(compiled, plain, device, tokens, lengths)
        check(compiled, plain, device, tokens.reshape(-1), torch.arange(4) * length)
        assert name != "one hot token" or int(ours[-1][1]) == (3 if length else 0)


def colliding(distinct: int) -> Tensor:
    """Ids whose hashes (mix in csrc/plan/common.cuh, inverted here) agree in all but the last bits: one slot, one tag."""
    found = []
    for hashed in range(7 << 40, (7 << 40) + distinct):
        x = hashed * pow(0xC4CEB9FE1A85EC53, -1, 2**64) % 2**64
        x = (x ^ x >> 33) * pow(0xFF51AFD7ED558CCD, -1, 2**64) % 2**64
        x ^= x >> 33
        found.append(x - 2**64 if x >= 2**63 else x)
    return torch.tensor(found)


def one_fingerprint(distinct: int) -> Tensor:
    """Ids of one fingerprint (csrc/plan/block.cuh): lower half and scaled upper half cancel."""
    return torch.tensor([high << 32 | high * 0x9E3779B1 % 2**32 for high in range(distinct)])


@pytest.mark.parametrize("ids_of", [colliding, one_fingerprint])
@pytest.mark.parametrize("length", [900, 3000, 9000])
def test_ids_whose_hashes_collide(
    device: str, compiled: Ops, plain: Ops, length: int, ids_of: Callable[[int], Tensor]
) -> None:
    g = torch.Generator().manual_seed(length)
    tokens = ids_of(length // 2)[torch.randint(0, length // 2, (2, length), generator=g)]
    lengths = torch.tensor([length, length - 1])
    check(compiled, plain, device, tokens, lengths)
    for bounds in (torch.tensor([0, 2 * length]), torch.tensor([0, length, 2 * length])):
        check(compiled, plain, device, tokens.view(-1), bounds)


def test_many_samples_repeat_to_the_bit(device: str, compiled: Ops, plain: Ops) -> None:
    g = torch.Generator().manual_seed(1)
    tokens, lengths = zipf(700, 50, 300), torch.randint(0, 51, (700,), generator=g)
    check(compiled, plain, device, tokens, lengths)
    args = (zipf(64, 3000, 4000).to(device), torch.randint(0, 3001, (64,), generator=g).to(device), -1)
    for tokens, extents, _ in (args, (args[0].reshape(-1), torch.arange(65, device=device) * 3000, -1)):
        for grouped in (True, False):
            first = trimmed(compiled("unique")(tokens, extents, -1, grouped))
            for _ in range(20):
                again = trimmed(compiled("unique")(tokens, extents, -1, grouped))
                assert all(torch.equal(again[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("packed", [False, True])
def test_a_number_of_rows_bounds_the_outputs(device: str, compiled: Ops, packed: bool) -> None:
    tokens, extents = torch.tensor([[5, 5, 9, 7], [9, 1, 1, 8]], device=device), torch.tensor([3, 2], device=device)
    if packed:
        tokens, extents = torch.tensor([5, 5, 9, 9, 1], device=device), torch.tensor([0, 3, 5], device=device)
    found = dict(zip(NAMES, compiled("unique")(tokens, extents, 6), strict=True))
    assert found["sizes"].tolist() == [5, 4, 2, 3, 1]
    assert found["distinct"].tolist() == [5, 9, 9, 1, 5, 5]  # spare rows have the first row's token
    assert found["counts"].tolist() == [2, 1, 1, 1, 0, 0]
    assert found["offsets"].tolist() == [0, 2, 3, 4, 5, 5, 5]  # rows past the last are empty segments
    spare = [0] * (tokens.numel() - 5)
    assert found["inverse"].tolist() == [0, 0, 1, 2, 3, *spare]
    if packed:  # what lies past the last bound is left out
        part = dict(zip(NAMES, compiled("unique")(tokens, torch.tensor([0, 2, 3], device=device), 6), strict=True))
        assert part["sizes"].tolist() == [3, 2, 1, 2, 1]
        assert part["order"].tolist() == [0, 1, 2, 0, 0] and part["offsets"].tolist() == [0, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [5, 5000, 17_000])
def test_rows_that_do_not_fit_are_none(device: str, compiled: Ops, plain: Ops, length: int, packed: bool) -> None:
    tokens, extents = zipf(3, length, 9 * length), torch.tensor([length, 0, length - 1])
    if packed:
        tokens, extents = tokens.reshape(-1), torch.tensor([0, length, length, 2 * length])
    rows = int(plain("unique")(tokens, extents, 4 * length)[-1][1])
    for room in (1, rows - 1, rows, rows + 1, 4 * length):
        found = compiled("unique")(tokens.to(device), extents.to(device), room)
        by_name = dict(zip(NAMES, (x.cpu() for x in found), strict=True))
        for name, want in zip(NAMES, plain("unique")(tokens, extents, room), strict=True):
            assert torch.equal(by_name[name], want), (name, room)
        assert by_name["sizes"][1] == rows  # says whether they fit
        for name, got in zip(
            NAMES, compiled("unique")(tokens.to(device), extents.to(device), room, False), strict=True
        ):
            assert got.numel() == 0 if name in ("order", "offsets") else torch.equal(got.cpu(), by_name[name]), (
                name,
                room,
            )
        for name in ("cu_seqlens", "counts", "inverse", "offsets"):
            assert bool(by_name[name].any()) == (rows <= room)
        first = tokens.reshape(-1)[0]
        assert bool((by_name["distinct"][rows:] == first).all()) and by_name["distinct"][0] == first


@given(st.lists(st.integers(0, 6), max_size=200), st.integers(0, 9), st.integers(0, 9))
def test_members_are_grouped_by_segment(
    device: str, compiled: Ops, plain: Ops, segments: list[int], empty: int, none: int
) -> None:
    index = torch.tensor(segments, dtype=torch.int64)
    counts = torch.bincount(index, minlength=7 + empty)
    index = torch.cat([index, index.new_full((none,), 99)])  # of no segment, whatever they say
    order, offsets = compiled("group")(index.to(device), counts.to(device))
    by_segment = [[i for i, s in enumerate(segments) if s == which] for which in range(7 + empty)]
    assert order.tolist() == [i for members in by_segment for i in members] + [0] * none
    assert offsets.tolist() == [sum(map(len, by_segment[:s])) for s in range(8 + empty)]
    for got, want in zip((order, offsets), plain("group")(index, counts), strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("tokens", "extents"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 4])),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([-1, 3])),
        (torch.zeros(6, dtype=torch.int64), torch.tensor([0, 3, 7])),
        (torch.zeros(6, dtype=torch.int64), torch.tensor([1, 3, 6])),
        (torch.zeros(6, dtype=torch.int64), torch.tensor([0, 4, 3, 6])),
    ],
    ids=["too long", "negative", "ends late", "starts late", "falls"],
)
def test_malformed_extents_find_nothing_and_say_so(device: str, compiled: Ops, tokens: Tensor, extents: Tensor) -> None:
    found = dict(zip(NAMES, compiled("unique")(tokens.to(device), extents.to(device), 6), strict=True))
    assert found["sizes"][[0, 1, 4]].tolist() == [0, 0, 0]
    assert not found["cu_seqlens"].any() and not found["counts"].any()
    build = UniqueSpace.from_padded if tokens.dim() == 2 else UniqueSpace.from_packed
    with pytest.raises(ValueError, match=r"must (lie in|rise from)"):
        build(tokens.to(device), extents.to(device))


def test_wrong_types_are_named(device: str, compiled: Ops) -> None:
    tokens, lengths = torch.zeros(2, 3, device=device), torch.tensor([3, 3], device=device)
    with pytest.raises(ValueError, match=r"tokens is .*pass int64"):
        compiled("unique")(tokens, lengths, -1)
    with pytest.raises(ValueError, match="extents has 2 entries"):
        compiled("unique")(torch.zeros(3, 3, dtype=torch.int64, device=device), lengths, -1)
    with pytest.raises(ValueError, match="ranks is 0"):
        compiled("owners")(lengths, 0, 5, 1)


@given(st.lists(ids, max_size=30), st.integers(1, 9))
def test_owners_equal_plain_torch(device: str, compiled: Ops, plain: Ops, values: list[int], ranks: int) -> None:
    x = torch.tensor(values, dtype=torch.int64)
    assert torch.equal(compiled("owners")(x.to(device), ranks, 0, 0).cpu(), plain("owners")(x, ranks, 0, 0))
    rows = PermutedRows(1_000_003, ranks)
    args = (ranks, rows.vocab_size, rows.multiplier)
    x = x % rows.vocab_size
    assert torch.equal(compiled("owners")(x.to(device), *args).cpu(), plain("owners")(x, *args))
    assert HashOwners(ranks).owner_of(x).tolist() == [splitmix(v) % ranks for v in x.tolist()]


def splitmix(x: int) -> int:
    """The finaliser in Python's whole numbers, shifted to 63 bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 300), st.integers(0, 99))
def test_partition_equals_plain_torch(
    device: str, compiled: Ops, plain: Ops, sizes: list[int], ranks: int, seed: int
) -> None:
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    owner = torch.randint(0, ranks, (int(bounds[-1]),), generator=torch.Generator().manual_seed(seed))
    for got, want in zip(
        compiled("partition")(owner.to(device), bounds.to(device), ranks),
        plain("partition")(owner, bounds, ranks),
        strict=True,
    ):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("form", ["compiled", "plain"])
@pytest.mark.parametrize("ranks", [1, 3, 256])
@pytest.mark.parametrize("nobody", [-1, 0, 2**40, -(2**63)])
def test_items_without_an_owner_come_last_and_show_in_every_size(
    device: str, compiled: Ops, plain: Ops, form: str, ranks: int, nobody: int
) -> None:
    nobody = nobody or ranks  # the first number that is no rank
    bounds, owner = torch.tensor([0, 700, 700, 1000]), torch.arange(1000) % ranks
    owner[5] = owner[699] = nobody
    operator = compiled("partition") if form == "compiled" else plain("partition")
    order, sizes = (x.cpu() for x in operator(owner.to(device), bounds.to(device), ranks))
    assert bool((sizes[:, 0] < 0).all()) and not sizes[:, 1].any()
    assert sizes[:, 2].tolist() == torch.bincount(owner[700:], minlength=ranks).tolist()
    assert order[-2:].tolist() == [5, 699]
    assert order.tolist() == sorted(range(1000), key=lambda i: (i in (5, 699), int(owner[i])))


@pytest.mark.parametrize("bounds", [[0, 50_000], [0, 0, 20_000, 20_001, 50_000]])
def test_partition_of_long_samples(device: str, compiled: Ops, plain: Ops, bounds: list[int]) -> None:
    owner = torch.randint(0, 8, (50_000,), generator=torch.Generator().manual_seed(0))
    owner[:9000] = 3
    ours = compiled("partition")(owner.to(device), torch.tensor(bounds, device=device), 8)
    for got, want in zip(ours, plain("partition")(owner, torch.tensor(bounds), 8), strict=True):
        assert torch.equal(got.cpu(), want)


def test_torch_accepts_the_operators(device: str, compiled: Ops) -> None:
    tokens, lengths = torch.tensor([[5, 5, 9], [9, 1, 1]], device=device), torch.tensor([3, 2], device=device)
    torch.library.opcheck(compiled("unique").default, (tokens, lengths, 6))
    torch.library.opcheck(compiled("unique").default, (tokens.view(-1), torch.tensor([0, 4, 6], device=device), 6))
    torch.library.opcheck(compiled("unique").default, (tokens, lengths, 6, False))
    torch.library.opcheck(compiled("group").default, (torch.tensor([0, 1, 0, 0, 0], device=device), lengths - 1))
    torch.library.opcheck(compiled("owners").default, (tokens.view(-1), 3, 100, 7))
    torch.library.opcheck(compiled("local_rows").default, (tokens.view(-1), 2, 5, 100, 7, -1))
    bounds = torch.tensor([0, 2, 3], device=device)
    torch.library.opcheck(compiled("partition").default, (torch.tensor([1, 0, 1], device=device), bounds, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("length", [40, 20_000])
def test_a_plan_with_rows_is_captured_in_a_graph(device: str, compiled: Ops, plain: Ops, length: int) -> None:
    if device != "cuda":
        return
    tokens, lengths = zipf(4, length, 2 * length).cuda(), torch.tensor([length, 0, length // 2, 3]).cuda()
    rows = 4 * length
    compiled("unique")(tokens, lengths, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compiled("unique")(tokens, lengths, rows)
    tokens.copy_(zipf(4, length, length, seed=5))
    lengths.copy_(torch.tensor([1, length, length, 7]))
    graph.replay()
    same(found, plain("unique")(tokens.cpu(), lengths.cpu(), -1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_what_a_graph_groups_stays_in_it(device: str) -> None:
    if device != "cuda":
        return
    segments = Segments.from_index(torch.tensor([2, 0, 2, 1], device=device), 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = segments.order
    outside = segments.order  # before a replay
    assert outside.tolist() == [1, 3, 0, 2] and segments.order is outside
    graph.replay()
    assert inside is not outside and torch.equal(inside, outside)
