"""The chunk size: what the model weighs, and that it follows it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from ta_plugin import UniqueSpace
from ta_plugin.attention import CausalChunks, choose_chunk
from ta_plugin.attention.chunk_cost import SIZES, ChunkRates

CPU = torch.device("cpu")


def space_of(length: int, vocabulary: int, documents: int = 1) -> UniqueSpace:
    tokens = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    return UniqueSpace.from_packed(tokens, torch.linspace(0, length, documents + 1).long())


def test_the_formula() -> None:
    rates = ChunkRates(pair=1.0, weight=100.0, chunk=1000.0, decay=500.0, start=7e6, move=3.0, tile=32)
    choice = choose_chunk(space_of(4096, 64), heads=2, head_dim=8, device=CPU, rates=rates)
    beta = 0.5  # 64 rows of 4096
    before, inside, weights, cutting = choice.seconds[256]
    assert abs(before - 16 * 4096 * 64 / (1 + beta)) < 1e-6 * before
    assert inside == 16 * 4096 * (256 + 32) / 2
    assert abs(weights - 16 * (100 * 64 / (1 + beta) + 1000)) < 1e-6 * weights
    assert cutting == 7e6 + 3 * 16 * 4096
    assert list(choice.seconds) == [*(size for size in SIZES if size < 4096), 4096]
    assert choice.seconds[4096] == (0.0, 16 * 4096 * (4096 + 32) / 2, 0.0, 0.0)
    assert choice.size == min(choice.seconds, key=lambda size: sum(choice.seconds[size]))
    assert f"-> {choice.size:>6}" in str(choice)
    decayed = choose_chunk(space_of(4096, 64), heads=2, head_dim=8, device=CPU, rates=rates, decayed=True)
    assert decayed.seconds[256][2] > 1.2 * weights
    assert decayed.size >= choice.size


def test_dearer_weights_make_longer_chunks() -> None:
    space = space_of(65536, 4096)
    sizes = [
        choose_chunk(
            space,
            8,
            64,
            CPU,
            rates=ChunkRates(pair=1e-12, weight=w, chunk=0.0, decay=0.0, start=0.0, move=0.0, tile=32),
        ).size
        for w in (1e-12, 1e-9, 1e-6)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_what_cutting_costs_decides_whether_to_cut() -> None:
    """A long text of few rows is cut, unless that costs more than all pairs; a short one, or one without repeats, is not."""
    rates = {"pair": 1e-13, "weight": 1e-11, "chunk": 1e-6, "decay": 0.0, "tile": 32}
    for length, vocabulary, start, move, cut in (
        (16384, 100, 0.0, 0.0, True),
        (16384, 100, 1.0, 0.0, False),
        (16384, 100, 0.0, 1e-9, False),
        (300, 100, 1e-4, 0.0, False),
        (16384, 1 << 40, 0.0, 1e-12, False),
    ):
        space = space_of(length, vocabulary)
        choice = choose_chunk(space, 8, 64, CPU, rates=ChunkRates(start=start, move=move, **rates))  # type: ignore[arg-type]
        assert CausalChunks.of(space, choice.size).one_per_sample == (not cut), (length, vocabulary, start, move)


def test_short_documents_are_not_cut() -> None:
    space = space_of(6400, 500, documents=100)
    choice = choose_chunk(space, 4, 16, CPU)
    assert choice.size == 64 and choice.seconds == {64: choice.seconds[64]} and choice.seconds[64][0] == 0.0
    assert choose_chunk(UniqueSpace.from_packed(torch.empty(0, dtype=torch.int64)), 4, 16, CPU).size == 1


def test_it_foretells_the_measured_table() -> None:
    """Where samples are cut, the figures of causal_growth.py lie near: a kernel that changes them wants new rates."""
    text = (Path(__file__).parents[2] / "examples/benchmarks/README.md").read_text()
    rows = [
        (int(length), int(distinct), float(ms))
        for table in re.findall(r"### \w+, causal\n(.*?)\n### |### \w+, causal\n(.*?)$", text, re.DOTALL)
        for length, distinct, ms in re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \(", "".join(table), re.MULTILINE)
    ]
    assert len(rows) == 18
    for length, distinct, ms in rows:
        space = SimpleNamespace(host_bounds=([0, length], [0, distinct]), num_occurrences=length)
        choice = choose_chunk(space, 16, 64, torch.device("cuda"))  # type: ignore[arg-type]
        assert (choice.size < length) == (length >= 16384)
        if choice.size < length:
            assert 0.7 < 1e3 * sum(choice.seconds[choice.size]) / ms < 1.4, (length, distinct)
