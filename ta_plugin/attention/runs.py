"""Queries with a row of weights each (`q_chunk`), seen as runs: neighbours of one sample that use the same row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """Packed queries bounds[r] .. bounds[r + 1] are of sample samples[r] and use row chunks[r] of `num_chunks`."""

    bounds: list[int]
    samples: list[int]
    chunks: list[int]
    num_chunks: int

    @classmethod
    def of(cls, q_chunk: Tensor, num_chunks: int, cu_seqlens_q: Tensor) -> Runs:
        """From q_chunk (Q,) int and the samples' bounds (B + 1,); copies the runs to the host.

        Raises ValueError for a chunk outside [0, num_chunks).
        """
        queries = q_chunk.shape[0]
        if queries == 0:
            return cls([0], [], [], num_chunks)
        device = q_chunk.device
        bounds = cu_seqlens_q[1:].contiguous()
        place = torch.arange(queries, device=device, dtype=bounds.dtype)
        sample = torch.bucketize(place, bounds, right=True)
        starts = torch.ones(queries, dtype=torch.bool, device=device)
        starts[1:] = (q_chunk[1:] != q_chunk[:-1]) | (sample[1:] != sample[:-1])
        first = starts.nonzero().squeeze(1)
        bounds_of, samples, chunks = torch.stack([first, sample[first], q_chunk[first].long()]).tolist()
        lowest, highest = min(chunks), max(chunks)
        if lowest < 0 or highest >= num_chunks:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"q_chunk holds {wrong}, but there are {num_chunks} chunks (rows of log_weight, entries of k_visible)"
            )
        return cls([*bounds_of, queries], samples, chunks, num_chunks)

    @property
    def ascending(self) -> bool:
        """Whether each chunk is one run, in ascending order: then a chunk belongs to one sample, its queries side by side."""
        return all(a < b for a, b in pairwise(self.chunks))

    def with_own_rows(self) -> Runs:
        """The same runs, run r with row r: of weights from which row chunks[r] was taken for it. They ascend."""
        return Runs(self.bounds, self.samples, list(range(len(self.chunks))), len(self.chunks))

    @property
    def mean_length(self) -> float:
        """Queries per run."""
        return self.bounds[-1] / max(len(self.chunks), 1)

    def cu_chunks(self, num_samples: int) -> tuple[list[int], list[int]]:
        """For ascending runs of at least one sample: bounds of each chunk's queries (C + 1,), and of each sample's chunks (B + 1,).

        A chunk without queries is empty, and counted to the sample of the chunk before it.
        """
        lengths, owner = [0] * self.num_chunks, [0] * self.num_chunks
        for chunk, sample, (begin, end) in zip(self.chunks, self.samples, pairwise(self.bounds), strict=True):
            lengths[chunk], owner[chunk] = end - begin, sample
        queries, chunks = [0], [0] * num_samples
        last = 0
        for length, sample in zip(lengths, owner, strict=True):
            queries.append(queries[-1] + length)
            last = max(last, sample)
            chunks[last] += 1
        bounds = [0]
        for count in chunks:
            bounds.append(bounds[-1] + count)
        return queries, bounds
