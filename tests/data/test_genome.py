"""Spans hidden from a genome leave its counts, its windows, and nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.data.fasta import kmer_ids
from ta_plugin.data.genome import MASKED, Genome

records = st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=60), min_size=1, max_size=3).map(
    lambda all_bases: {str(i): torch.tensor([0, 1, 2, *bases], dtype=torch.uint8) for i, bases in enumerate(all_bases)}
)


@given(records, st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 5))
def test_counts_without_spans_are_those_of_the_genome_with_unknown_bases_there(
    parts: dict[str, torch.Tensor], k: int, length: int, seed: int, count: int
) -> None:
    genome = Genome.of(parts, k)
    generator = torch.Generator().manual_seed(seed)
    starts = genome.spans(count, length, 0, genome.bases.numel(), generator)
    blanked = genome.bases.clone()
    for start in starts.tolist():
        blanked[start : start + length] = 4
    visible = kmer_ids(blanked, k)
    expected = torch.stack([(visible == kmer).sum() for kmer in genome.kmers])
    assert torch.equal(genome.counts_without(starts, length), expected)


@given(records, st.integers(1, 6), st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 80))
def test_windows_show_no_hidden_base(
    parts: dict[str, torch.Tensor], length: int, seed: int, count: int, flank: int
) -> None:
    genome = Genome.of(parts, 1)
    starts = genome.spans(count, length, 0, genome.bases.numel(), torch.Generator().manual_seed(seed))
    hidden = {start + i for start in starts.tolist() for i in range(length)}
    for start, window in zip(starts.tolist(), genome.windows(starts, length, flank).tolist(), strict=True):
        for place, shown in zip(range(start - flank, start + length + flank), window, strict=True):
            inside = 0 <= place < genome.bases.numel()
            assert shown == (MASKED if place in hidden else int(genome.bases[place]) if inside else 4)


def test_kmers_do_not_cross_records() -> None:
    genome = Genome.of(
        {"a": torch.tensor([0, 0, 0], dtype=torch.uint8), "b": torch.tensor([1, 1], dtype=torch.uint8)}, 2
    )
    assert genome.kmers.tolist() == [0b0000, 0b0101]
    assert genome.counts.tolist() == [2, 1]
