"""Unique space: the distinct tokens of each sample, packed one sample after another (RFC step 5, "unique space")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.checks import check_int64
from ta_plugin.ops import Segments, UniqueRows, expand, segment_logsumexp, segment_sum, unique_rows

INT32_MAX = 2**31 - 1
_SHORT = 4096


@dataclass(frozen=True)
class UniqueSpace:
    """Distinct tokens per sample in order of first occurrence, and the maps between them and the occurrences.

    With B samples, M occurrences (valid slots, packed sample by sample) and U rows (distinct tokens, summed over samples):

    tokens:         (U,) int64
    cu_seqlens:     (B + 1,) int32, the rows of sample b are cu_seqlens[b]:cu_seqlens[b + 1]
    counts:         (U,) int64, the multiplicity of each row
    cu_occurrences: (B + 1,) int64, the same bounds for occurrences
    segments:       occurrences -> rows; `segments.index` is the inverse (M,)
    slots:          (M,) int64, slot of each occurrence in the flattened (B, L) grid; None for packed input
    padded_length:  L for padded input, None for packed
    spare_rows:     how many of the last rows no occurrence maps to; see `with_spare_rows`

    Build it with `from_padded`, `from_packed` or `of_occurrences`. A `BoundedSpace` is one whose numbers never visit the host.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    cu_occurrences: Tensor
    segments: Segments
    slots: Tensor | None = None
    padded_length: int | None = None
    spare_rows: int = 0

    @classmethod
    def from_padded(cls, tokens: Tensor, lengths: Tensor, *, grouped: bool | None = None) -> UniqueSpace:
        """From tokens (B, L) int64 and lengths (B,) int64; slots past a sample's length are ignored.

        grouped: whether the occurrences of each row are found with the rows, as folds and the backward of `expand` need them; by default
                 where gradients are enabled. Otherwise they are found when they are first read, at a higher price.
        """
        check_padded(tokens, lengths)
        found = unique_rows(tokens, lengths, torch.is_grad_enabled() if grouped is None else grouped)
        if not found.well_formed:
            raise bad_lengths(found.lowest, found.highest, tokens.shape[1])
        return replace(cls._of(found), slots=found.slots, padded_length=tokens.shape[1])

    @classmethod
    def from_packed(cls, tokens: Tensor, cu_seqlens: Tensor | None = None) -> UniqueSpace:
        """From tokens (M,) int64 and cu_seqlens (B + 1,) integer. Without cu_seqlens all M are one sample."""
        tokens, bounds = packed_extents(tokens, cu_seqlens)
        found = unique_rows(tokens, bounds, torch.is_grad_enabled())
        if not found.well_formed:
            raise _bad_bounds(tokens, bounds)
        return cls._of(found)

    @classmethod
    def of_occurrences(
        cls, tokens: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> UniqueSpace:
        """Every occurrence as a row of its own, multiplicity 1: plain attention over positions in the same terms.

        Padded tokens (B, L) with lengths (B,), or packed tokens (M,) with cu_seqlens (B + 1,).
        """
        slots, length = None, None
        if lengths is not None:
            slots, bounds = _valid_slots(tokens, lengths)
            tokens, length = tokens.reshape(-1)[slots], tokens.shape[1]
        else:
            check_int64("tokens", tokens, 1)
            bounds = _checked_bounds(tokens, cu_seqlens)
        each = torch.arange(tokens.numel(), device=tokens.device)
        segments = Segments(each, each, torch.arange(tokens.numel() + 1, device=tokens.device))
        return cls(tokens, bounds.int(), torch.ones_like(tokens), bounds, segments, slots, length)

    @classmethod
    def of_rows(cls, tokens: Tensor, cu_seqlens: Tensor) -> UniqueSpace:
        """`of_occurrences` of packed tokens (M,) whose bounds (B + 1,) int32 this package made: nothing is read to check them."""
        each = torch.arange(tokens.numel() + 1, device=tokens.device)
        segments = Segments(each[:-1], each[:-1], each)
        return cls(tokens, cu_seqlens, tokens.new_ones(1).expand(tokens.numel()), cu_seqlens.long(), segments)

    @classmethod
    def _of(cls, found: UniqueRows) -> UniqueSpace:
        rows = found.distinct.numel()
        if rows > INT32_MAX:
            raise ValueError(f"tokens hold {rows} distinct rows; cu_seqlens is int32, so split the batch below 2**31")
        segments = Segments.found(found.inverse, found.grouped, found.counts)
        return cls(found.distinct, found.cu_seqlens, found.counts, found.cu_occurrences, segments)

    def __repr__(self) -> str:
        """Sizes, which the host knows."""
        rows = self.num_rows - self.spare_rows
        spare = f" and {self.spare_rows} spare" if self.spare_rows else ""
        repeats = f"L/U {self.num_occurrences / rows:.2f}" if rows else "L/U undefined"
        where = f"{self.num_occurrences} occurrences, {repeats}, {self.tokens.device}"
        return f"UniqueSpace({self.num_samples} samples, {rows} rows{spare}, {where})"

    @property
    def num_samples(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_rows(self) -> int:
        return self.tokens.numel()

    @property
    def num_occurrences(self) -> int:
        return self.segments.num_members

    @cached_property
    def host_bounds(self) -> tuple[list[int], list[int]]:
        """cu_occurrences and cu_seqlens as the host knows them; more than one sample is read from the device, once."""
        if self.num_samples == 1:
            return [0, self.num_occurrences], [0, self.num_rows]
        both = torch.cat([self.cu_occurrences, self.cu_seqlens.long()]).tolist()
        return both[: self.num_samples + 1], both[self.num_samples + 1 :]

    @property
    def end(self) -> Tensor | None:
        """(1,) where the spare rows of a `BoundedSpace` begin; None where there are none."""
        return None

    @property
    def inverse(self) -> Tensor:
        """(M,) int64: the row of each occurrence."""
        return self.segments.index

    @property
    def all_distinct(self) -> bool:
        """Whether no sample repeats a token; then every log weight of plain attention is 0."""
        return self.spare_rows == 0 and self.num_rows == self.num_occurrences

    def as_packed(self) -> UniqueSpace:
        """The same space, for values that are already packed (M, ...)."""
        return replace(self, slots=None, padded_length=None)

    def with_spare_rows(self, multiple: int) -> UniqueSpace:
        """The same space with its rows rounded up to a multiple of `multiple`, so that shapes repeat from batch to batch.

        Spare rows belong to the last sample with multiplicity 0 (log weight -inf, an absent key) and token 0; nothing expands from
        them, so that whatever they hold is exact. Without samples there is nothing to add to.
        """
        spare = -self.num_rows % multiple
        if spare == 0 or self.num_samples == 0:
            return self
        tokens, counts = (F.pad(x, (0, spare)) for x in (self.tokens, self.counts))
        cu_seqlens = F.pad(self.cu_seqlens[:-1], (0, 1), value=tokens.numel())
        return replace(
            self,
            tokens=tokens,
            counts=counts,
            cu_seqlens=cu_seqlens,
            segments=self.segments.with_empty(spare),
            spare_rows=self.spare_rows + spare,
        )

    def fill_spare_rows(self, rows: Tensor) -> Tensor:
        """Rows (U - spare, ...) to (U, ...): spare rows are copies of the last, through which no gradient flows.

        Copies and not zeros: what runs on them is then finite wherever it is finite on a real row.
        """
        if self.spare_rows == 0:
            return rows
        last = rows[-1:].detach() if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:])
        return torch.cat([rows, last.expand(self.spare_rows, *rows.shape[1:])])

    def positions(self) -> Tensor:
        """(M,) int64: each occurrence's position in its sample."""
        begin = self.cu_occurrences[self.sample_of_occurrences()]
        return torch.arange(self.num_occurrences, device=self.tokens.device) - begin

    def sample_of_rows(self) -> Tensor:
        """(U,) int64: the sample of each row."""
        return torch.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.num_rows)

    def sample_of_occurrences(self) -> Tensor:
        """(M,) int64: the sample of each occurrence."""
        return torch.repeat_interleave(self.cu_occurrences.diff(), output_size=self.num_occurrences)

    def expand(self, rows: Tensor) -> Tensor:
        """Rows (U, ...) to occurrences: (B, L, ...) with zeros past the lengths for padded input, (M, ...) for packed."""
        return self.unpack(expand(rows, self.segments))

    def unpack(self, occurrences: Tensor) -> Tensor:
        """The inverse of `pack`: (M, ...) to (B, L, ...) with zeros past the lengths; as it is for packed input."""
        if self.slots is None or self.padded_length is None:
            return occurrences
        length, slots = self.padded_length, self.num_samples * self.padded_length
        grid = occurrences
        if self.num_occurrences != slots:
            grid = occurrences.new_zeros(slots, *occurrences.shape[1:]).index_copy(0, self.slots, occurrences)
        return grid.reshape(self.num_samples, length, *occurrences.shape[1:])

    def pack(self, values: Tensor) -> Tensor:
        """Per-occurrence values (B, L, ...) of padded input to (M, ...); packed values (M, ...) pass through."""
        if self.slots is None or self.padded_length is None:
            if values.shape[0] != self.num_occurrences:
                raise ValueError(
                    f"values have {values.shape[0]} rows; pass one per occurrence ({self.num_occurrences})"
                )
            return values
        expected = (self.num_samples, self.padded_length)
        if values.dim() < 2 or tuple(values.shape[:2]) != expected:
            raise ValueError(f"values have shape {tuple(values.shape)}; pass {expected} or {expected} + (...)")
        return self._pack(values.reshape(-1, *values.shape[2:]), self.slots)

    def _pack(self, grid: Tensor, slots: Tensor) -> Tensor:
        return grid if self.num_occurrences == grid.shape[0] else grid.index_select(0, slots)

    def fold(self, values: Tensor, how: str = "sum") -> Tensor:
        """Per-occurrence values to rows (U, ...): `how` is "sum", "mean" or "logsumexp" over each row's occurrences."""
        packed = self.pack(values)
        if how == "logsumexp":
            return segment_logsumexp(packed, self.segments)
        if how not in ("sum", "mean"):
            raise ValueError(f"how is {how!r}; pass 'sum', 'mean' or 'logsumexp'")
        total = segment_sum(packed, self.segments)
        return total if how == "sum" else total / self.counts.clamp(min=1).view(-1, *([1] * (total.dim() - 1)))

    def log_counts(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """log multiplicity (U,), or None where every count is 1 and the weights would all be 0."""
        if self.all_distinct:
            return None
        wide = torch.promote_types(dtype, torch.float32)
        # the logarithm of integers is of the default type, without a copy of them in between
        return self.counts.log() if wide == torch.get_default_dtype() else self.counts.to(wide).log()

    def fold_bias(self, bias: Tensor) -> Tensor:
        """Additive per-occurrence score biases b_j (B, L[, H]) or (M[, H]) to log weights w_u = logsumexp b_j (U[, H]).

        Returned in float32 or wider (DESIGN section 3); -inf removes an occurrence.
        """
        return self.fold(bias.to(torch.promote_types(bias.dtype, torch.float32)), "logsumexp")

    def fold_value_term(self, term: Tensor, bias: Tensor | None = None) -> Tensor:
        """Per-occurrence value terms r_j (..., H, D) to rows (U, H, D): the mean of r_j weighted by softmax(b_j).

        bias: the same per-occurrence biases that `fold_bias` took, (..., ) or (..., H); None means equal weights.
        """
        if bias is None:
            return self.fold(term, "mean")
        packed = self.pack(bias).to(torch.promote_types(bias.dtype, torch.float32))
        log_weight = segment_logsumexp(packed, self.segments)
        safe = log_weight.masked_fill(log_weight == -torch.inf, 0.0)
        share = (packed - expand(safe, self.segments)).exp()
        share = share.view(*share.shape, *([1] * (self.pack(term).dim() - share.dim())))
        return segment_sum((share * self.pack(term)).to(term.dtype), self.segments)


def check_padded(tokens: Tensor, lengths: Tensor) -> None:
    check_int64("tokens", tokens, 2)
    check_int64("lengths", lengths, 1)
    if lengths.shape[0] != tokens.shape[0]:
        raise ValueError(f"lengths has {lengths.shape[0]} entries for {tokens.shape[0]} samples; pass one per sample")


def bad_lengths(lowest: int, highest: int, length: int) -> ValueError:
    return ValueError(f"lengths lie in [{lowest}, {highest}]; they must lie in [0, L] with L = {length}")


def _valid_slots(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices (M,) of the valid slots of (B, L), and the bounds of samples (B + 1,) among them."""
    check_padded(tokens, lengths)
    if lengths.numel():
        lowest, highest = torch.stack(lengths.aminmax()).tolist()
        if not 0 <= lowest <= highest <= tokens.shape[1]:
            raise bad_lengths(lowest, highest, tokens.shape[1])
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    bounds = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=tokens.device)
    torch.cumsum(lengths, 0, out=bounds[1:])
    return valid.reshape(-1).nonzero().squeeze(1), bounds


def packed_extents(tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed tokens and their bounds as `unique` takes them: few tokens of one sample as a padded one, with its length."""
    check_int64("tokens", tokens, 1)
    if cu_seqlens is None and 0 < tokens.numel() <= _SHORT:
        # one thread block on a GPU, fewer launches
        return tokens[None], torch.full((1,), tokens.numel(), device=tokens.device)
    return tokens, _bounds(tokens, cu_seqlens)


def _bounds(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        size = tokens.numel()  # made on the device: a copy from the host would wait for it
        return torch.arange(0, size + 1, size, device=tokens.device) if size else tokens.new_zeros(2)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise _bad_bounds(tokens, cu_seqlens)
    return cu_seqlens.long()


def _checked_bounds(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    bounds = _bounds(tokens, cu_seqlens)
    ends = (int(bounds[0]), int(bounds[-1]))
    if ends != (0, tokens.numel()) or bool((bounds.diff() < 0).any()):
        raise _bad_bounds(tokens, bounds)
    return bounds


def _bad_bounds(tokens: Tensor, bounds: Tensor) -> ValueError:
    flat = bounds.reshape(-1)
    first, last = (int(flat[0]), int(flat[-1])) if flat.numel() else (None, None)
    return ValueError(
        f"cu_seqlens runs from {first} to {last}; it must rise from 0 to the number of tokens, {tokens.numel()}"
    )
