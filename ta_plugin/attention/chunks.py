"""How a space's occurrences are cut into chunks for causal attention, and the groups of chunks that are computed at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ta_plugin.ops import Segments, segment_sum
from ta_plugin.unique_space import UniqueSpace

SPAN = 1 << 16  # queries of a group: enough to fill a GPU, and a bound on the keys gathered at their positions


@dataclass(frozen=True)
class Group:
    """Consecutive chunks first .. last - 1: queries start .. stop - 1, which see rows row_start .. row_stop - 1 or fewer.

    pairs:    first and one past the last of its (chunk, row) pairs
    samples:  likewise of its samples
    prefixed: whether any of its queries has something before its chunk
    """

    first: int
    last: int
    start: int
    stop: int
    row_start: int
    row_stop: int
    pairs: tuple[int, int]
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


@dataclass(frozen=True)
class CausalChunks:
    """The M occurrences of a space cut, sample by sample, into n chunks of `size` (the last of a sample shorter).

    Everything before a chunk is a count per row; the P pairs of a chunk and a row that occurs in it are what changes them.

    bounds:      (n + 1,) int64, occurrences of each chunk
    samples:     (n,) int64, the sample of each chunk
    visible:     (n,) int32, how many of its sample's rows occur before a chunk: its `k_visible`
    pair_chunk, pair_row, pair_counts: (P,) int64, by ascending chunk, then row
    pair_order:  (M,) int64, occurrences sorted by pair; pair_offsets (P + 1,) int64 bounds them
    host_*:      what the host needs to know of these, with the rows that begin before each bound

    Build it once per batch with `of`; every layer uses it. All index arithmetic is int64.
    """

    space: UniqueSpace
    size: int
    bounds: Tensor
    samples: Tensor
    visible: Tensor
    pair_chunk: Tensor
    pair_row: Tensor
    pair_counts: Tensor
    pair_order: Tensor
    pair_offsets: Tensor
    host_bounds: list[int]
    host_samples: list[int]
    host_first_row: list[int]
    host_rows_begun: list[int]
    host_pairs: list[int]

    @classmethod
    def of(cls, space: UniqueSpace, size: int) -> CausalChunks:
        """Cut the occurrences of `space` into chunks of `size`. Raises ValueError unless size >= 1."""
        if size < 1:
            raise ValueError(f"chunk is {size}; pass 1 or more")
        device = space.tokens.device
        samples, bounds = cut(space.cu_occurrences.cpu(), size)
        host_samples, host_bounds = samples.tolist(), bounds.tolist()
        samples, bounds = samples.to(device), bounds.to(device)
        # rows stand in the order of their first occurrence, so those that begin before a bound are a prefix
        first = space.segments.order[space.segments.offsets[:-1]]
        begun = torch.searchsorted(first, bounds)
        first_row = space.cu_seqlens.long()[samples]
        visible = (begun[:-1] - first_row).int()

        by_row = space.segments.order  # by row, then position
        chunk_of = torch.repeat_interleave(bounds.diff(), output_size=space.num_occurrences)
        chunk, by_chunk = chunk_of[by_row].sort(stable=True)
        order = by_row[by_chunk]  # by chunk, then row, then position
        row = space.inverse[order]
        starts = torch.ones_like(row, dtype=torch.bool)
        starts[1:] = (row[1:] != row[:-1]) | (chunk[1:] != chunk[:-1])
        begin = starts.nonzero().squeeze(1)
        offsets = torch.cat([begin, begin.new_tensor([space.num_occurrences])])
        pair_chunk = chunk[begin]
        host = torch.cat([begun, first_row, torch.searchsorted(pair_chunk, torch.arange(len(host_bounds)).to(device))])
        rows_begun, first_rows, pairs = host.cpu().split([len(host_bounds), len(host_samples), len(host_bounds)])
        return cls(
            space=space,
            size=size,
            bounds=bounds,
            samples=samples,
            visible=visible,
            pair_chunk=pair_chunk,
            pair_row=row[begin],
            pair_counts=offsets.diff(),
            pair_order=order,
            pair_offsets=offsets,
            host_bounds=host_bounds,
            host_samples=host_samples,
            host_first_row=first_rows.tolist(),
            host_rows_begun=rows_begun.tolist(),
            host_pairs=pairs.tolist(),
        )

    @property
    def num_chunks(self) -> int:
        return len(self.host_samples)

    def groups(self, cells: int, span: int = SPAN) -> list[Group]:
        """Consecutive chunks together while chunks x rows stays within `cells`, and queries within `span`; at least one each."""
        found: list[Group] = []
        first = 0
        for last in range(1, self.num_chunks + 1):
            if last < self.num_chunks:
                grown = (last + 1 - first) * (self.host_rows_begun[last + 1] - self.host_first_row[first])
                if grown <= cells and self.host_bounds[last + 1] - self.host_bounds[first] <= span:
                    continue
            found.append(self._group(first, last))
            first = last
        return found

    def _group(self, first: int, last: int) -> Group:
        inside = range(first, last)
        return Group(
            first,
            last,
            self.host_bounds[first],
            self.host_bounds[last],
            self.host_first_row[first],
            self.host_rows_begun[last],
            (self.host_pairs[first], self.host_pairs[last]),
            (self.host_samples[first], self.host_samples[last - 1] + 1),
            any(self.host_rows_begun[c] > self.host_first_row[c] for c in inside),
        )

    def chunk_of(self, group: Group) -> Tensor:
        """(queries,) int32: the chunk of each query, counted from the group's first."""
        sizes = self.bounds[group.first : group.last + 1].diff()
        chunk = torch.arange(group.size, dtype=torch.int32, device=sizes.device)
        return chunk.repeat_interleave(sizes, output_size=group.stop - group.start)

    def bounds_of(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """int32 bounds within a group: of its samples' queries and of their rows, and of its chunks."""
        which = slice(group.samples[0], group.samples[1] + 1)
        queries = self.space.cu_occurrences[which].clamp(group.start, group.stop) - group.start
        rows = self.space.cu_seqlens[which].clamp(group.row_start, group.row_stop) - group.row_start
        return queries.int(), rows.int(), (self.bounds[group.first : group.last + 1] - group.start).int()

    def chunks_of_samples(self, group: Group) -> Tensor:
        """int32 bounds, within a group, of its samples' chunks."""
        samples = torch.arange(group.samples[0], group.samples[1] + 1, device=self.samples.device)
        return torch.searchsorted(self.samples[group.first : group.last], samples, out_int32=True)

    def pairs_of(self, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A group's pairs: chunk and row, counted from the group's first, and their counts; and all occurrences -> pairs."""
        which = slice(*group.pairs)
        chunk, row = self.pair_chunk[which] - group.first, self.pair_row[which] - group.row_start
        return chunk, row, self.pair_counts[which], self.pair_offsets[which.start : which.stop + 1] - group.start

    def fold(self, values: Tensor, group: Group) -> Tensor:
        """Sum of per-query values (queries, ...) by row, (rows, ...) in float32 or wider.

        Pair by pair first, so that no frequent row sums long; on CUDA, where sums form in float32, these keep the dtype of the values.
        """
        wide = torch.promote_types(values.dtype, torch.float32)
        values = values if values.is_cuda else values.to(wide)
        _, row, _, offsets = self.pairs_of(group)
        order = self.pair_order[group.queries] - group.start
        by_pair = segment_sum(values, Segments(order, order, offsets)).to(wide)
        by_row, order = row.sort(stable=True)
        bounds = torch.arange(group.row_stop - group.row_start + 1, device=row.device)
        return segment_sum(by_pair, Segments(row, order, torch.searchsorted(by_row, bounds)))


def cut(cu_occurrences: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Bounds of samples (B + 1,) int64 to the sample of each chunk (n,) and the bounds of chunks (n + 1,), int64."""
    lengths = cu_occurrences.diff()
    per_sample = (lengths + size - 1).div(size, rounding_mode="floor")
    samples = torch.repeat_interleave(per_sample)
    before = per_sample.cumsum(0) - per_sample
    starts = cu_occurrences[samples] + (torch.arange(samples.numel()) - before[samples]) * size
    return samples, torch.cat([starts, cu_occurrences[-1:]])
