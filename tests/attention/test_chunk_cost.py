"""The chunk size: what the model weighs, and that it follows it."""

from __future__ import annotations

import torch

from ta_plugin import UniqueSpace
from ta_plugin.attention import choose_chunk
from ta_plugin.attention.chunk_cost import SIZES, ChunkRates

CPU = torch.device("cpu")


def space_of(length: int, vocabulary: int, documents: int = 1) -> UniqueSpace:
    tokens = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    return UniqueSpace.from_packed(tokens, torch.linspace(0, length, documents + 1).long())


def test_the_formula() -> None:
    rates = ChunkRates(pair=1.0, weight=100.0, chunk=1000.0, decay=500.0, tile=32)
    choice = choose_chunk(space_of(4096, 64), heads=2, head_dim=8, device=CPU, rates=rates)
    beta = 0.5  # 64 rows of 4096
    before, inside, weights = choice.seconds[256]
    assert abs(before - 16 * 4096 * 64 / (1 + beta)) < 1e-6 * before
    assert inside == 16 * 4096 * (256 + 32) / 2
    assert abs(weights - 16 * (100 * 64 / (1 + beta) + 1000)) < 1e-6 * weights
    assert choice.size == min(SIZES, key=lambda size: sum(choice.seconds[size]))
    assert f"-> {choice.size:>6}" in str(choice)
    decayed = choose_chunk(space_of(4096, 64), heads=2, head_dim=8, device=CPU, rates=rates, decayed=True)
    assert decayed.seconds[256][2] > 1.2 * weights
    assert decayed.size >= choice.size


def test_dearer_weights_make_longer_chunks() -> None:
    space = space_of(65536, 4096)
    sizes = [
        choose_chunk(space, 8, 64, CPU, rates=ChunkRates(pair=1e-12, weight=w, chunk=0.0, decay=0.0, tile=32)).size
        for w in (1e-12, 1e-9, 1e-6)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_short_documents_have_nothing_before_their_chunk() -> None:
    choice = choose_chunk(space_of(6400, 500, documents=100), 4, 16, CPU)
    assert choice.seconds[64][0] == 0.0
    assert choose_chunk(UniqueSpace.from_packed(torch.empty(0, dtype=torch.int64)), 4, 16, CPU).size in SIZES
