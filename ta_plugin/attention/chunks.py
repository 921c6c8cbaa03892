"""How a space's occurrences are cut into chunks for causal attention, and the groups of chunks that are computed at a time."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ta_plugin.ops import Segments, expand, segment_sum
from ta_plugin.unique_space import UniqueSpace

SPAN = 1 << 16  # queries of a group: enough to fill a GPU, and a bound on the keys gathered at their positions


@dataclass(frozen=True)
class Group:
    """Consecutive chunks first .. last - 1: queries start .. stop - 1, which see rows row_start .. row_stop - 1 or fewer.

    samples:  first and one past the last of its samples
    prefixed: whether any of its queries has something before its chunk
    """

    first: int
    last: int
    start: int
    stop: int
    row_start: int
    row_stop: int
    samples: tuple[int, int]
    prefixed: bool

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_stop)

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start


@dataclass(frozen=True)
class Before:
    """How many rows lie before each of n chunks: rows stand in the order of their first occurrence, so those are a prefix.

    visible:     (n,) int32 of a chunk's own sample, its `k_visible`
    rows_begun:  n + 1, rows of all samples that begin before each bound; on the host
    first_row:   n, the first row of a chunk's sample; on the host
    """

    visible: Tensor
    rows_begun: list[int]
    first_row: list[int]


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a chunk and a row that occurs in it.

    chunk, row: (P,) int64, by ascending chunk, then row
    order:      (M,) int64, occurrences sorted by pair; offsets (P + 1,) int64 bounds them
    host:       (n + 1) bounds of each chunk's pairs, on the host
    """

    chunk: Tensor
    row: Tensor
    order: Tensor
    offsets: Tensor
    host: list[int]


@dataclass(frozen=True)
class GroupIndex:
    """What a group's calls index with, counted from the group's first query, row, chunk and sample.

    segments:         its queries -> its rows
    bounds:           (chunks + 1,) int64, of its chunks' queries
    cu_queries, cu_rows, cu_chunks: int32 bounds of its samples' queries and rows, and of its chunks' queries
    chunks_of_samples: int32 bounds of its samples' chunks
    """

    segments: Segments
    bounds: Tensor
    cu_queries: Tensor
    cu_rows: Tensor
    cu_chunks: Tensor
    chunks_of_samples: Tensor

    @cached_property
    def chunk(self) -> Tensor:
        """(queries,) int64, of each query."""
        return torch.repeat_interleave(self.bounds.diff(), output_size=self.segments.num_members)


@dataclass(frozen=True)
class CausalChunks:
    """The M occurrences of a space cut, sample by sample, into n chunks of `size` (the last of a sample shorter).

    bounds, host_bounds:   (n + 1,) int64, occurrences of each chunk
    samples, host_samples: (n,) int64, the sample of each chunk

    Build it once per batch with `of`; every layer uses it. What a call needs beside the bounds is made by the first that does and kept:
    about 3 int64 per occurrence. All index arithmetic is int64.
    """

    space: UniqueSpace
    size: int
    host_bounds: list[int]
    host_samples: list[int]
    _made: dict[tuple[int, int], GroupIndex] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, space: UniqueSpace, size: int) -> CausalChunks:
        """Cut the occurrences of `space` into chunks of `size`. Raises ValueError unless size >= 1, or for spare rows."""
        if size < 1:
            raise ValueError(f"chunk is {size}; pass 1 or more")
        if space.spare_rows:
            raise ValueError(f"space has {space.spare_rows} spare rows; cut it before with_spare_rows")
        samples, bounds = cut(space.host_bounds[0], size)
        return cls(space, size, bounds, samples)

    @property
    def num_chunks(self) -> int:
        return len(self.host_samples)

    @cached_property
    def one_per_sample(self) -> bool:
        """Whether no sample is cut, so that nothing lies before a chunk: plain causal attention over positions."""
        return all(a != b for a, b in pairwise(self.host_samples))

    @cached_property
    def bounds(self) -> Tensor:
        return torch.tensor(self.host_bounds, device=self.space.tokens.device)

    @cached_property
    def samples(self) -> Tensor:
        return torch.tensor(self.host_samples, dtype=torch.int64, device=self.space.tokens.device)

    @cached_property
    def before(self) -> Before:
        """Reads the device once; where no sample is cut the host knows."""
        space = self.space
        if self.one_per_sample:
            first_row = [space.host_bounds[1][sample] for sample in self.host_samples]
            return Before(self.bounds.new_zeros(self.num_chunks).int(), [*first_row, space.num_rows], first_row)
        first = space.segments.order[space.segments.offsets[:-1]]
        begun = torch.searchsorted(first, self.bounds)
        visible = (begun[:-1] - space.cu_seqlens.long()[self.samples]).int()
        rows = space.host_bounds[1]
        return Before(visible, begun.tolist(), [rows[sample] for sample in self.host_samples])

    @cached_property
    def pairs(self) -> Pairs:
        """What changes a decayed sum from chunk to chunk. Reads the device twice."""
        space, device = self.space, self.space.tokens.device
        by_row = space.segments.order  # by row, then position
        chunk_of = torch.repeat_interleave(self.bounds.diff(), output_size=space.num_occurrences)
        chunk, by_chunk = chunk_of[by_row].sort(stable=True)
        order = by_row[by_chunk]  # by chunk, then row, then position
        row = space.inverse[order]
        starts = torch.ones_like(row, dtype=torch.bool)
        starts[1:] = (row[1:] != row[:-1]) | (chunk[1:] != chunk[:-1])
        begin = starts.nonzero().squeeze(1)
        pair_chunk = chunk[begin]
        host = torch.searchsorted(pair_chunk, torch.arange(self.num_chunks + 1, device=device)).tolist()
        offsets = torch.cat([begin, begin.new_tensor([space.num_occurrences])])
        return Pairs(pair_chunk, row[begin], order, offsets, host)

    @cached_property
    def whole(self) -> Group:
        """All chunks together."""
        return self._group(0, self.num_chunks)

    def groups(self, cells: int, span: int = SPAN) -> list[Group]:
        """Consecutive chunks together while chunks x rows stays within `cells`, and queries within `span`; at least one each."""
        begun, first_row = self.before.rows_begun, self.before.first_row
        found: list[Group] = []
        first = 0
        for last in range(1, self.num_chunks + 1):
            if last < self.num_chunks:
                grown = (last + 1 - first) * (begun[last + 1] - first_row[first])
                if grown <= cells and self.host_bounds[last + 1] - self.host_bounds[first] <= span:
                    continue
            found.append(self._group(first, last))
            first = last
        return found

    def _group(self, first: int, last: int) -> Group:
        begun, first_row = self.before.rows_begun, self.before.first_row
        return Group(
            first,
            last,
            self.host_bounds[first],
            self.host_bounds[last],
            first_row[first],
            begun[last],
            (self.host_samples[first], self.host_samples[last - 1] + 1),
            any(begun[c] > first_row[c] for c in range(first, last)),
        )

    def index_of(self, group: Group) -> GroupIndex:
        key = (group.first, group.last)
        if key not in self._made:
            self._made[key] = self._index(group)
        return self._made[key]

    def _index(self, group: Group) -> GroupIndex:
        space = self.space
        which = slice(group.samples[0], group.samples[1] + 1)
        ends = [bisect_right(self.host_samples, sample, group.first, group.last) for sample in range(*group.samples)]
        of_samples = [0, *(end - group.first for end in ends)]
        bounds, cu_queries, cu_rows = self.bounds, space.cu_occurrences[which], space.cu_seqlens[which]
        segments = space.segments
        if group.size < self.num_chunks:
            bounds = bounds[group.first : group.last + 1] - group.start
            cu_queries = cu_queries.clamp(group.start, group.stop) - group.start
            cu_rows = cu_rows.clamp(group.row_start, group.row_stop) - group.row_start
            segments = self._segments(group)
        return GroupIndex(
            segments=segments,
            bounds=bounds,
            cu_queries=cu_queries.int(),
            cu_rows=cu_rows.int(),
            cu_chunks=bounds.int(),
            chunks_of_samples=torch.tensor(of_samples, dtype=torch.int32, device=bounds.device),
        )

    def _segments(self, group: Group) -> Segments:
        """The queries of a group -> its rows."""
        index = self.space.inverse[group.queries] - group.row_start
        by_row, order = index.int().sort(stable=True)
        offsets = torch.searchsorted(by_row, torch.arange(group.num_rows + 1, dtype=torch.int32, device=index.device))
        return Segments(index, order, offsets)

    def pairs_of(self, group: Group) -> tuple[Tensor, Tensor, Segments]:
        """A group's pairs, chunk and row, and all occurrences -> pairs; counted from the group's first."""
        which = slice(self.pairs.host[group.first], self.pairs.host[group.last])
        chunk, row = self.pairs.chunk[which] - group.first, self.pairs.row[which] - group.row_start
        offsets = self.pairs.offsets[which.start : which.stop + 1] - group.start
        order = self.pairs.order[group.queries] - group.start
        index = torch.repeat_interleave(offsets.diff(), output_size=order.numel())
        return chunk, row, Segments(torch.empty_like(index).index_copy_(0, order, index), order, offsets)

    def spread(self, rows: Tensor, group: Group) -> Tensor:
        """Rows (U, ...) to the positions of a group's queries, (queries, ...)."""
        return expand(rows[group.rows], self.index_of(group).segments)

    def fold(self, values: Tensor, group: Group) -> Tensor:
        """Sum of per-query values (queries, ...) by row, (rows, ...): formed in float32 or wider; on CUDA rounded to their dtype once."""
        wide = values if values.is_cuda else values.to(torch.promote_types(values.dtype, torch.float32))
        return segment_sum(wide, self.index_of(group).segments)


def cut(cu_occurrences: list[int], size: int) -> tuple[list[int], list[int]]:
    """Bounds of samples (B + 1) to the sample of each chunk (n) and the bounds of chunks (n + 1)."""
    samples: list[int] = []
    bounds: list[int] = []
    for sample, (start, stop) in enumerate(pairwise(cu_occurrences)):
        starts = range(start, stop, size)
        samples += [sample] * len(starts)
        bounds += starts
    return samples, [*bounds, cu_occurrences[-1]]
