"""The plan of a batch: distinct tokens per sample, who owns an id, and the stable partition by owner.

Kernels: csrc/cpu/plan.cpp and csrc/plan/. Nothing here is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    order:           (M,) int64, occurrences by row, ascending within one
    offsets:         (U + 1,) int64, where each row begins in `order`
    slots:           (M,) int64, slot of each occurrence in the padded grid; empty for packed input
    lowest, highest: of the samples' lengths
    well_formed:     whether the lengths or bounds make sense; if not, M = U = 0
    """

    distinct: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    cu_occurrences: Tensor
    inverse: Tensor
    order: Tensor
    offsets: Tensor
    slots: Tensor
    lowest: int
    highest: int
    well_formed: bool


def unique_rows(tokens: Tensor, extents: Tensor) -> UniqueRows:
    """Tokens (B, L) int64 with lengths (B,) int64, or packed tokens (M,) with bounds (B + 1,) int64.

    One host synchronisation, for the sizes. Without any: torch.ops.ta_plugin.unique with a number of rows.
    """
    *found, sizes = UNIQUE(tokens, extents, -1)
    members, rows, lowest, highest, well_formed = sizes.tolist()
    distinct, cu_seqlens, counts, cu_occurrences, inverse, order, offsets, slots = found
    return UniqueRows(
        distinct[:rows],
        cu_seqlens,
        counts[:rows],
        cu_occurrences,
        inverse[:members],
        order[:members],
        offsets[: rows + 1],
        slots[:members],
        lowest,
        highest,
        bool(well_formed),
    )


def _unique_in_torch(tokens: Tensor, extents: Tensor, rows: int) -> tuple[Tensor, ...]:
    """As the compiled operator, which returns the same numbers with room to spare; these are as long as what was found."""
    padded = tokens.dim() == 2
    lengths = extents if padded else extents.diff()
    none = lengths.numel() == 0
    lowest, highest = (0, 0) if none else (int(lengths.min()), int(lengths.max()))
    ends = padded or (int(extents[0]), int(extents[-1])) == (0, tokens.numel())
    well_formed = ends and lowest >= 0 and (not padded or highest <= tokens.shape[1])
    lengths = lengths if well_formed else torch.zeros_like(lengths)
    bounds = tokens.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, 0, out=bounds[1:])

    if (
        padded
    ):  # one sort per sample: no composite key, so ids may use all 63 bits. Stable: equal tokens keep their order
        batch, length = tokens.shape
        valid = torch.arange(length, device=tokens.device) < lengths[:, None]
        slots = valid.reshape(-1).nonzero().squeeze(1)
        keys, rank_to_position = tokens.masked_fill(~valid, _NO_TOKEN).sort(dim=1, stable=True)
        order = (rank_to_position + bounds[:-1, None]).reshape(-1)[slots]
        starts = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        starts[:, 1:] = keys[:, 1:] != keys[:, :-1]
        tokens, starts = tokens.reshape(-1)[slots], starts.reshape(-1)[slots]
    else:
        slots = tokens.new_empty(0)
        tokens = tokens if well_formed else tokens[:0]
        keys, order = tokens.sort(stable=True)
        starts = torch.ones_like(tokens, dtype=torch.bool)
        if bounds.numel() == 2:
            starts[1:] = keys[1:] != keys[:-1]
        else:  # a second stable sort brings samples together and keeps each one's tokens sorted
            samples = torch.repeat_interleave(lengths, output_size=tokens.numel())
            keys_sample, by_sample = samples[order].sort(stable=True)
            keys, order = keys[by_sample], order[by_sample]
            starts[1:] = (keys[1:] != keys[:-1]) | (keys_sample[1:] != keys_sample[:-1])
    found = _number(tokens, order, starts, bounds)
    sizes = [tokens.numel(), found[0].numel(), lowest, highest, int(well_formed)]
    return *found, slots, torch.tensor(sizes, device=tokens.device)


def _number(tokens: Tensor, order: Tensor, starts: Tensor, bounds: Tensor) -> tuple[Tensor, ...]:
    """From occurrences (M,) `order`ed by (sample, token, position), `starts` marking the first of each token."""
    members = tokens.numel()
    begin = starts.nonzero().squeeze(1)
    rows = begin.numel()
    group = starts.cumsum(0) - 1
    first = order[begin]
    is_first = torch.zeros(members, dtype=torch.bool, device=tokens.device)
    is_first[first] = True
    rows_before = torch.zeros(members + 1, dtype=torch.int64, device=tokens.device)
    torch.cumsum(is_first, 0, out=rows_before[1:])
    row_of_group = rows_before[first]  # first-occurrence order: the rows that begin earlier

    sizes = torch.diff(begin, append=begin.new_tensor([members]))
    counts = torch.empty_like(sizes)
    counts[row_of_group] = sizes
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=tokens.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    row = row_of_group[group]
    inverse, by_row = torch.empty_like(order), torch.empty_like(order)
    inverse[order] = row
    by_row[offsets[row] + torch.arange(members, device=tokens.device) - begin[group]] = order
    return tokens[is_first], rows_before[bounds].int(), counts, bounds, inverse, by_row, offsets


def _unique_like(tokens: Tensor, extents: Tensor, rows: int) -> tuple[Tensor, ...]:
    slots = tokens.numel()
    capacity = slots if rows < 0 else rows
    bounds = extents.shape[0] + (1 if tokens.dim() == 2 else 0)
    widths = (capacity, bounds, capacity, bounds, slots, slots, capacity + 1, slots if tokens.dim() == 2 else 0, 5)
    return tuple(tokens.new_empty(n, dtype=torch.int32 if i == 1 else torch.int64) for i, n in enumerate(widths))


def _owners_in_torch(ids: Tensor, ranks: int, vocab: int, multiplier: int) -> Tensor:
    if vocab > 0:
        return ids * multiplier % vocab // -(-vocab // ranks)
    # splitmix64's finaliser (Steele, Lea, Flood 2014); torch's int64 product wraps, its shift is arithmetic
    x = ids
    for factor, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27)):
        x = (x ^ _logical_shift(x, shift)) * factor
    return _logical_shift(x ^ _logical_shift(x, 31), 1) % ranks


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _partition_in_torch(owner: Tensor, bounds: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    batch = bounds.numel() - 1
    samples = torch.repeat_interleave(bounds.diff(), output_size=owner.numel())
    sizes = torch.bincount(owner * batch + samples, minlength=ranks * batch).view(ranks, batch)
    return owner.argsort(stable=True), sizes


UNIQUE = Operator(
    "unique",
    "(Tensor tokens, Tensor extents, int rows) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _unique_in_torch,
    _unique_like,
)
OWNERS = Operator(
    "owners",
    "(Tensor ids, int ranks, int vocab, int multiplier) -> Tensor",
    _owners_in_torch,
    lambda ids, ranks, vocab, multiplier: torch.empty_like(ids),
)
PARTITION = Operator(
    "partition",
    "(Tensor owner, Tensor bounds, int ranks) -> (Tensor, Tensor)",
    _partition_in_torch,
    lambda owner, bounds, ranks: (torch.empty_like(owner), owner.new_empty(ranks, bounds.shape[0] - 1)),
)
