"""Runs of queries with one row of weights, and the chunk bounds the kernel wants, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.attention.runs import Runs


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5))
def test_runs_hold_neighbours_of_one_sample_and_chunk(samples: list[list[int]]) -> None:
    chunks = [c for sample in samples for c in sample]
    runs = Runs.of(torch.tensor(chunks, dtype=torch.int64), 4, bounds([len(s) for s in samples]))
    of_query = [(b, c) for b, sample in enumerate(samples) for c in sample]
    seen = []
    for r, (sample, chunk) in enumerate(zip(runs.samples, runs.chunks, strict=True)):
        begin, end = runs.bounds[r], runs.bounds[r + 1]
        assert begin < end
        assert set(of_query[begin:end]) == {(sample, chunk)}
        seen += of_query[begin:end]
        assert r == 0 or (runs.samples[r - 1], runs.chunks[r - 1]) != (sample, chunk)
    assert seen == of_query


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4), st.integers(0, 2))
def test_chunk_bounds_of_ascending_runs(samples: list[list[int]], unused: int) -> None:
    """Each sample is a list of chunk sizes, some of them 0; `unused` chunks follow the last."""
    sizes = [n for sample in samples for n in sample] + [0] * unused
    chunk = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    runs = Runs.of(chunk, len(sizes), bounds([sum(s) for s in samples]))
    assert runs.ascending
    queries, chunks = runs.cu_chunks(len(samples))
    assert queries == bounds(sizes).tolist()
    assert (chunks[0], chunks[-1], len(chunks)) == (0, len(sizes), len(samples) + 1)
    owner = [b for b, sample in enumerate(samples) for _ in sample]
    for c, b in enumerate(owner):
        if sizes[c]:  # whose sample an empty chunk is counted to changes nothing
            assert chunks[b] <= c < chunks[b + 1]


@pytest.mark.parametrize("chunks", [[1, 0], [0, 1, 0]])
def test_what_does_not_ascend_is_seen(chunks: list[int]) -> None:
    assert not Runs.of(torch.tensor(chunks), 2, bounds([len(chunks)])).ascending
    assert not Runs.of(torch.tensor([0, 0]), 1, bounds([1, 1])).ascending  # one row for two samples


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_chunk_that_is_not_there_is_named(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"q_chunk holds {wrong}, but there are 2 chunks"):
        Runs.of(torch.tensor([0, wrong]), 2, bounds([2]))
