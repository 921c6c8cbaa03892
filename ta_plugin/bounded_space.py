"""A unique space whose sizes the caller bounds: its numbers stay on the device, so that a CUDA graph can hold what is done with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ta_plugin.ops import Segments
from ta_plugin.ops.buckets import rows_where
from ta_plugin.ops.planning import UNIQUE
from ta_plugin.unique_space import INT32_MAX, UniqueSpace, bad_lengths, check_padded, packed_extents


@dataclass(frozen=True, repr=False)
class BoundedSpace(UniqueSpace):
    """A unique space that has the given number of rows and an occurrence for every slot, whatever the batch holds.

    Spare rows, behind the others, have multiplicity 0 and the first row's token, and are of no sample; spare occurrences fold into
    nothing. A batch that is malformed or has more distinct tokens than rows is taken for an empty one; `check` raises then.

    found: (5,) int64: M, U, the lowest and highest length, and whether the input was well formed; None where it is known to be
    """

    found: Tensor | None = None

    @classmethod
    def of_padded(cls, tokens: Tensor, lengths: Tensor, rows: int, *, grouped: bool | None = None) -> BoundedSpace:
        """From tokens (B, L) int64 and lengths (B,) int64, with `rows` rows; `grouped` as in `from_padded`."""
        check_padded(tokens, lengths)
        space, slots = cls._find(tokens, lengths, rows, grouped)
        return replace(space, slots=slots, padded_length=tokens.shape[1])

    @classmethod
    def of_packed(cls, tokens: Tensor, cu_seqlens: Tensor | None, rows: int) -> BoundedSpace:
        """From tokens (M,) int64 and cu_seqlens (B + 1,) integer, which may end before M: tokens from there on are left out.

        Without cu_seqlens all M are one sample.
        """
        return cls._find(*packed_extents(tokens, cu_seqlens), rows)[0]

    @classmethod
    def _find(
        cls, tokens: Tensor, extents: Tensor, rows: int, grouped: bool | None = None
    ) -> tuple[BoundedSpace, Tensor]:
        """The space, and the slots of its occurrences."""
        if not 1 <= rows <= INT32_MAX:
            raise ValueError(f"rows is {rows}; pass how many distinct rows there may be, 1 to {INT32_MAX}")
        wanted = torch.is_grad_enabled() if grouped is None else grouped
        distinct, cu_seqlens, counts, cu_occurrences, inverse, *members, slots, found = UNIQUE(
            tokens, extents, rows, wanted
        )
        # rows that do not fit are 0 in all but `order` and `cu_occurrences`, which nothing reads past the offsets
        segments = Segments.found(inverse, members if wanted else None, counts)
        return cls(distinct, cu_seqlens, counts, cu_occurrences, segments, found=found), slots

    def __repr__(self) -> str:
        """Bounds: the host knows no more."""
        room = f"room for {self.num_rows} rows, {self.num_occurrences} occurrences"
        return f"BoundedSpace({self.num_samples} samples, {room}, {self.tokens.device})"

    def check(self) -> None:
        """Raise the ValueError that could not be raised when the space was built. Reads the device."""
        if self.found is None:
            return
        _, rows, lowest, highest, well_formed = self.found.tolist()
        if not well_formed and self.padded_length is not None:
            raise bad_lengths(lowest, highest, self.padded_length)
        if not well_formed:
            raise ValueError("cu_seqlens does not rise from 0 to the number of tokens")
        if rows > self.num_rows:
            raise ValueError(f"tokens hold {rows} distinct rows, but rows is {self.num_rows}; build it with more rows")

    @cached_property
    def host_bounds(self) -> tuple[list[int], list[int]]:
        """cu_occurrences and cu_seqlens, read from the device, once."""
        both = torch.cat([self.cu_occurrences, self.cu_seqlens.long()]).tolist()
        return both[: self.num_samples + 1], both[self.num_samples + 1 :]

    @property
    def end(self) -> Tensor:
        return self.cu_seqlens[-1:]

    @property
    def all_distinct(self) -> bool:
        return False

    def sample_of_rows(self) -> Tensor:
        return _sample_of(self.num_rows, self.cu_seqlens)

    def sample_of_occurrences(self) -> Tensor:
        return _sample_of(self.num_occurrences, self.cu_occurrences)

    def unpack(self, occurrences: Tensor) -> Tensor:
        if self.padded_length is None:
            return occurrences
        place = torch.arange(self.padded_length, device=occurrences.device)
        valid = place < self.cu_occurrences.diff()[:, None]
        at = torch.where(valid, self.cu_occurrences[:-1, None] + place, 0)
        grid = rows_where(valid.view(-1), occurrences.index_select(0, at.view(-1)))
        return grid.reshape(self.num_samples, self.padded_length, *occurrences.shape[1:])

    def _pack(self, grid: Tensor, slots: Tensor) -> Tensor:
        """Neither values nor gradients of slots past a length."""
        there = torch.arange(self.num_occurrences, device=grid.device) < self.cu_occurrences[-1]
        return rows_where(there, grid.index_select(0, slots))


def _sample_of(size: int, bounds: Tensor) -> Tensor:
    """(size,) int64: between which bounds each place lies; spare ones count to the last sample."""
    return torch.bucketize(torch.arange(size, device=bounds.device), bounds[1:-1], right=True)
