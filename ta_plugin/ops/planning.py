"""The plan of a batch: distinct tokens per sample, who owns an id, and the stable partition by owner.

Kernels: csrc/cpu/plan.cpp and csrc/plan/. Nothing here is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.registry import Operator

_NO_TOKEN = torch.iinfo(torch.int64).max  # sorts behind every token; ids are at most 2**63 - 2


@dataclass(frozen=True)
class UniqueRows:
    """What `unique_rows` finds: M occurrences, packed sample by sample, and U rows, the distinct tokens of each sample.

    distinct:        (U,) int64, tokens in order of first occurrence
    cu_seqlens:      (B + 1,) int32, bounds of each sample's rows
    counts:          (U,) int64
    cu_occurrences:  (B + 1,) int64, bounds of each sample's occurrences
    inverse:         (M,) int64, the row of each occurrence
    grouped:         order (M,) int64, occurrences by row, ascending within one, and offsets (U + 1,) int64, where each row begins in
                     it; None where they were not asked for
    slots:           (M,) int64, slot of each occurrence in the padded grid; empty for packed input
    lowest, highest: of the samples' lengths
    well_formed:     whether the lengths or bounds make sense; if not, M = U = 0
    """

    distinct: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    cu_occurrences: Tensor
    inverse: Tensor
    grouped: tuple[Tensor, Tensor] | None
    slots: Tensor
    lowest: int
    highest: int
    well_formed: bool


def unique_rows(tokens: Tensor, extents: Tensor, grouped: bool) -> UniqueRows:
    """Tokens (B, L) int64 with lengths (B,) int64, or packed tokens (M,) with bounds (B + 1,) int64.

    `grouped` says whether occurrences are wanted by row as well: `GROUP` finds that later, at a higher price. One host synchronisation, for
    the sizes. Without any: torch.ops.ta_plugin.unique with a number of rows.
    """
    *found, sizes = UNIQUE(tokens, extents, -1, grouped)
    members, rows, lowest, highest, well_formed = sizes.tolist()
    distinct, cu_seqlens, counts, cu_occurrences, inverse, order, offsets, slots = found
    return UniqueRows(
        distinct[:rows],
        cu_seqlens,
        counts[:rows],
        cu_occurrences,
        inverse[:members],
        (order[:members], offsets[: rows + 1]) if grouped else None,
        slots[:members],
        lowest,
        highest,
        bool(well_formed),
    )


def _unique_in_torch(tokens: Tensor, extents: Tensor, rows: int, grouped: bool = True) -> tuple[Tensor, ...]:
    """As the compiled operator: the same sizes, and nothing visits the host. Order and offsets are empty unless `grouped`.

    With a number of `rows`, packed tokens may end before their slots do: bounds[-1] <= M. What lies past the rows and occurrences there are
    is filled: distinct with the first token, offsets with M, all else with 0. Where there are more distinct tokens than `rows`, cu_seqlens,
    counts, inverse and offsets are 0.
    """
    padded, slots, device = tokens.dim() == 2, tokens.numel(), tokens.device
    lengths = extents if padded else extents.diff()
    lowest, highest = torch.aminmax(lengths) if lengths.numel() else (tokens.new_zeros(()), tokens.new_zeros(()))
    well_formed = (lowest >= 0) & (highest <= tokens.shape[1]) if padded else (lowest >= 0) & (extents[0] == 0)
    if not padded:
        well_formed = well_formed & (extents[-1] == slots if rows < 0 else extents[-1] <= slots)
    lengths = lengths * well_formed
    bounds = tokens.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, 0, out=bounds[1:])
    place = torch.arange(slots, device=device)

    # slots in the order of (sample, token, position), and which of them begin a token
    if padded:
        # one sort per sample: no composite key, so ids may use all 63 bits. Stable: equal tokens keep their order
        batch, length = tokens.shape
        inside = torch.arange(length, device=device)
        valid = inside < lengths[:, None]
        keys, order = tokens.masked_fill(~valid, _NO_TOKEN).sort(dim=1, stable=True)
        order = (order + length * torch.arange(batch, device=device)[:, None]).view(-1)
        starts = valid.clone()
        starts[:, 1:] &= keys[:, 1:] != keys[:, :-1]
        starts, sample_ends = starts.view(-1), length * torch.arange(batch + 1, device=device)
        occurrence = torch.where(valid, bounds[:-1, None] + inside, slots).view(-1)
    else:
        order = tokens.argsort(stable=True)
        starts = torch.ones_like(tokens, dtype=torch.bool)
        starts[1:] = tokens[order[1:]] != tokens[order[:-1]]
        if bounds.numel() > 2 or rows >= 0:
            # a second stable sort brings samples together and keeps each one's tokens sorted
            sample = torch.bucketize(place, bounds[1:], right=True)
            order = order[sample[order].argsort(stable=True)]
            starts[1:] = (tokens[order[1:]] != tokens[order[:-1]]) | (sample[order[1:]] != sample[order[:-1]])
        valid = place < bounds[-1]
        starts, sample_ends = starts & valid, bounds
        occurrence = torch.where(valid, place, slots)
    found, num_rows = _number(tokens.reshape(-1), order, starts, occurrence, slots if rows < 0 else rows)
    distinct, counts, inverse, by_row, offsets, rows_before = found
    grid = _placed(slots, occurrence, place) if padded else tokens.new_empty(0)
    cu_seqlens = rows_before[sample_ends]
    if rows >= 0:
        fits = num_rows <= rows
        distinct = torch.where(torch.arange(rows, device=device) < num_rows, distinct, distinct[:1])
        cu_seqlens, counts, inverse, offsets = (x * fits for x in (cu_seqlens, counts, inverse, offsets))
    sizes = torch.stack([bounds[-1], num_rows, lowest, highest, well_formed.long()])
    if not grouped:
        by_row, offsets = by_row[:0], offsets[:0]
    return distinct, cu_seqlens.int(), counts, bounds, inverse, by_row, offsets, grid, sizes


def _number(
    tokens: Tensor, order: Tensor, starts: Tensor, occurrence: Tensor, rows: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Rows by first occurrence, from slots (S,) `order`ed by (sample, token, position), `starts` marking the first of each token.

    occurrence: (S,) of each slot, S where there is none; occurrences also lie so among the ordered ones
    """
    slots = tokens.numel()
    last = max(slots, rows)  # one place more than there can be rows, for what belongs to none
    is_first = torch.empty_like(starts)
    is_first[order] = starts
    rows_before = F.pad(is_first.cumsum(0), (1, 0))
    begin = torch.where(starts, torch.arange(slots, device=tokens.device), 0).cummax(0).values
    row = torch.where(
        occurrence < slots, rows_before[order[begin]], last
    )  # first-occurrence order: the rows that begin earlier
    counts = tokens.new_zeros(last + 1).scatter_add_(0, row, torch.ones_like(row))[:last]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    within = torch.where(row < last, offsets[row] + occurrence - occurrence[begin], slots)
    distinct = _placed(last, torch.where(is_first, rows_before[:-1], last), tokens)
    inverse = _placed(slots, occurrence[order], torch.where(row < last, row, 0))
    by_row = _placed(slots, within, occurrence[order])
    return (distinct[:rows], counts[:rows], inverse, by_row, offsets[: rows + 1], rows_before), rows_before[-1]


def _placed(size: int, where: Tensor, values: Tensor) -> Tensor:
    """(size,) int64 with each value in its place and 0 elsewhere; a place of `size` drops it."""
    return values.new_zeros(size + 1).scatter_(0, where, values)[:size]


def _unique_like(tokens: Tensor, extents: Tensor, rows: int, grouped: bool = True) -> tuple[Tensor, ...]:
    slots = tokens.numel()
    capacity = slots if rows < 0 else rows
    bounds = extents.shape[0] + (1 if tokens.dim() == 2 else 0)
    by_row = (slots, capacity + 1) if grouped else (0, 0)
    widths = (capacity, bounds, capacity, bounds, slots, *by_row, slots if tokens.dim() == 2 else 0, 5)
    return tuple(tokens.new_empty(n, dtype=torch.int32 if i == 1 else torch.int64) for i, n in enumerate(widths))


def _group_in_torch(index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """index (M,) and counts (U,) -> order (M,), members by segment, and offsets (U + 1,); members behind offsets[U] are of none."""
    offsets = F.pad(counts.cumsum(0), (1, 0))
    there = torch.arange(index.shape[0], device=index.device) < offsets[-1]
    order = torch.where(there, index, counts.shape[0]).argsort(stable=True)
    return torch.where(there, order, 0), offsets


def _owners_in_torch(ids: Tensor, ranks: int, vocab: int, multiplier: int) -> Tensor:
    if vocab > 0:
        return torch.where((ids >= 0) & (ids < vocab), ids * multiplier % vocab // -(-vocab // ranks), -1)
    # splitmix64's finaliser (Steele, Lea, Flood 2014); torch's int64 product wraps, its shift is arithmetic
    x = ids
    for factor, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        x = (x ^ _logical_shift(x, shift)) * factor
    return _logical_shift(x ^ _logical_shift(x, 31), 1) % ranks


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _local_rows_in_torch(ids: Tensor, first: int, held: int, vocab: int, multiplier: int, other: int) -> Tensor:
    rows = ids * multiplier % vocab - first
    return torch.where((ids >= 0) & (ids < vocab) & (rows >= 0) & (rows < held), rows, other)


def _partition_in_torch(owner: Tensor, bounds: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    batch = bounds.numel() - 1
    samples = torch.repeat_interleave(bounds.diff(), output_size=owner.numel())
    owner = torch.where((owner >= 0) & (owner < ranks), owner, ranks)  # nobody's come last, as those of one more rank
    sizes = torch.bincount(owner * batch + samples, minlength=(ranks + 1) * batch).view(ranks + 1, batch)
    return owner.argsort(stable=True), sizes[:-1].masked_fill(sizes[-1] > 0, -1)


UNIQUE = Operator(
    "unique",
    "(Tensor tokens, Tensor extents, int rows, bool grouped=True) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _unique_in_torch,
    _unique_like,
)
GROUP = Operator(
    "group",
    "(Tensor index, Tensor counts) -> (Tensor order, Tensor offsets)",
    _group_in_torch,
    lambda index, counts: (torch.empty_like(index), counts.new_empty(counts.shape[0] + 1)),
)
OWNERS = Operator(
    "owners",
    "(Tensor ids, int ranks, int vocab, int multiplier) -> Tensor",
    _owners_in_torch,
    lambda ids, ranks, vocab, multiplier: torch.empty_like(ids),
)
LOCAL_ROWS = Operator(
    "local_rows",
    "(Tensor ids, int first, int held, int vocab, int multiplier, int other) -> Tensor",
    _local_rows_in_torch,
    lambda ids, first, held, vocab, multiplier, other: torch.empty_like(ids),
)
PARTITION = Operator(
    "partition",
    "(Tensor owner, Tensor bounds, int ranks) -> (Tensor, Tensor)",
    _partition_in_torch,
    lambda owner, bounds, ranks: (torch.empty_like(owner), owner.new_empty(ranks, bounds.shape[0] - 1)),
)
