"""The plan of one microbatch: which rows the layers run on, and the object that brings it to every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ta_plugin.strategies import OwnedRows
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class RowLayout:
    """How the U distinct rows of a microbatch lie in the layers: padded to P = parts * local rows, one part per CP rank.

    space: the distinct rows of all samples, the same on every rank of the context-parallel group; with `owned` the rows that
           this rank owns, which are its part
    first: the first row of this rank's part; local: rows in each part, padding included
    owned: where the context-parallel ranks read chunks of the samples: the way to the rows of the others, and to the readers
    """

    space: UniqueSpace
    first: int
    local: int
    owned: OwnedRows | None = None

    @classmethod
    def of(
        cls,
        space: UniqueSpace,
        *,
        parts: int = 1,
        part: int = 0,
        multiple: int = 1,
        capacity: int | Sequence[int] | None = None,
    ) -> RowLayout:
        """Divide the rows into equal parts of a multiple of `multiple` rows, at least one each.

        capacity: of all parts together, instead of as few rows as possible; of several, the smallest that holds the rows. Raises
        ValueError when the rows do not fit.
        """
        local = max(1, -(-space.num_rows // (parts * multiple))) * multiple
        if capacity is not None:
            local = (
                _fitting(
                    capacity, parts * multiple, space.num_rows, f"the microbatch has {space.num_rows} distinct rows"
                )
                // parts
            )
        return cls(space, part * local, local)

    @classmethod
    def of_owned(cls, owned: OwnedRows, *, multiple: int = 1, capacity: int | Sequence[int] | None = None) -> RowLayout:
        """The rows that this rank owns, padded to a multiple of `multiple`, or to its part of `capacity` (of several, the smallest
        that holds them on every rank).

        Raises ValueError on every rank of the group when some rank's rows do not fit.
        """
        parts = owned.group.size
        if capacity is not None:
            busiest = max(owned.rows_of_ranks)
            what = f"the busiest of {parts} context-parallel ranks owns {busiest} distinct rows, {parts * busiest} over all"
            return cls(owned.space, 0, _fitting(capacity, parts * multiple, parts * busiest, what) // parts, owned)
        return replace(cls.of(owned.space, multiple=multiple), owned=owned)

    @property
    def rows(self) -> int:
        """How many of this part's rows are not padding."""
        return min(max(self.space.num_rows - self.first, 0), self.local)

    def tokens(self) -> Tensor:
        """(rows,) int64: the distinct tokens of this part."""
        return self.space.tokens[self.first : self.first + self.rows]

    def pad(self, rows: Tensor) -> Tensor:
        """(rows, ...) to (local, ...), zeros in the padding."""
        missing = self.local - rows.shape[0]
        return rows if missing == 0 else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))

    def query_bounds(self) -> Tensor:
        """(B + 1,) int32: the bounds of each sample among this part's rows."""
        bounds = self.space.cu_seqlens
        return bounds if self.rows == self.space.num_rows else (bounds - self.first).clamp(0, self.rows)

    def counts(self) -> Tensor:
        """(local,) int64: multiplicities of this part's rows, 0 in the padding."""
        return self.pad(self.space.counts[self.first : self.first + self.rows])


def _fitting(capacity: int | Sequence[int], multiple: int, rows: int, what: str) -> int:
    """The smallest capacity that holds `rows`; a ValueError that says `what` needs them."""
    sizes = sorted([capacity] if isinstance(capacity, int) else capacity)
    uneven = [size for size in sizes if size % multiple]
    if uneven:
        raise ValueError(
            f"row_capacity is {capacity}; {uneven[0]} is no multiple of {multiple} (context parallel size, row_multiple, "
            "and tensor parallel size under sequence parallelism)"
        )
    fitting = [size for size in sizes if rows <= size]
    if not fitting:
        raise ValueError(
            f"{what}, but row_capacity is {capacity}; raise it (batch size x length always suffices where rows are shared "
            "evenly), or make microbatches smaller"
        )
    return fitting[0]


@dataclass
class TokenizedSeqParams(PackedSeqParams):
    """PackedSeqParams that carry a `RowLayout`.

    Megatron hands this object, unlike any global, to the right layer of the right microbatch under every pipeline schedule
    and in every recomputation.
    """

    layout: RowLayout | None = field(default=None)

    @classmethod
    def of(cls, layout: RowLayout) -> TokenizedSeqParams:
        """Packed ("thd") parameters of a layout, for any model made of tokenized layers."""
        bounds = layout.space.cu_seqlens
        base = {"qkv_format": "thd", "cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
        known = {f.name for f in fields(cls)}
        return cls(layout=layout, **{name: value for name, value in base.items() if name in known})


def layout_of(packed_seq_params: PackedSeqParams | None) -> RowLayout:
    """The layout a layer was given. Raises ValueError when there is none."""
    layout = getattr(packed_seq_params, "layout", None)
    if layout is None:
        raise ValueError(
            "a tokenized layer was called without its plan (packed_seq_params is "
            f"{type(packed_seq_params).__name__}); use ta_plugin.megatron.TokenizedModel, or pass "
            "packed_seq_params=TokenizedSeqParams.of(layout) with the hidden states of the layout's rows. "
            "Stock training scripts give layers no tokens"
        )
    return layout


def plan_microbatch(tokens: Tensor, lengths: Tensor, **options: int | Sequence[int] | None) -> TokenizedSeqParams:
    """Tokens (B, L) int64 and lengths (B,) int64 to what the layers need; options of `RowLayout.of`. Local to the rank."""
    return TokenizedSeqParams.of(RowLayout.of(UniqueSpace.from_padded(tokens, lengths), **options))  # type: ignore[arg-type]
