"""Self-, cross- and target attention over a history held in unique space, composed from the kernel contracts."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ta_plugin.attention.scoring import Scoring, singletons
from ta_plugin.attention.sides import RowWeights, Sides, target_weights
from ta_plugin.ops import expand
from ta_plugin.unique_space import UniqueSpace


def self_attention(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    value_term: Tensor | None = None,
    multiplier: Tensor | None = None,
    scoring: Scoring | None = None,
) -> Tensor:
    """Bidirectional attention of each sample's distinct tokens onto each other: rows in, rows (U, H, Dv) out.

    Equal to attention over all positions, read at any occurrence of each token. q (U, H, D), k (U, Hk, D), v (U, Hk, Dv);
    bias, value_term and multiplier per occurrence, shaped as the space's tokens were given: (B, L[, H]), (B, L, Hv, Dv).
    """
    if q.shape[0] != space.num_rows:
        raise ValueError(f"q has {q.shape[0]} rows, but the space {space.num_rows}; pass one row per distinct token")
    out, _ = cross_attention(
        space, q, space.cu_seqlens, k, v, bias=bias, value_term=value_term, multiplier=multiplier, scoring=scoring
    )
    return out


def cross_attention(
    space: UniqueSpace,
    q: Tensor,
    cu_seqlens_q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    value_term: Tensor | None = None,
    multiplier: Tensor | None = None,
    scoring: Scoring | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed queries q (Q, H, D) of each sample onto its history's rows: out (Q, H, Dv), and lse (Q, H) under softmax."""
    if k.shape[0] != space.num_rows:
        raise ValueError(f"k has {k.shape[0]} rows, but the space {space.num_rows}; pass one row per distinct token")
    scoring = scoring or Scoring()
    sides = Sides.pack(space, bias, value_term, multiplier)
    weights = RowWeights.fold(space, sides, scoring.normaliser, q.dtype)
    return attend_rows(scoring, q, cu_seqlens_q, k, v, weights, space.cu_seqlens)


def padded_target_attention(
    space: UniqueSpace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    cutoffs: Tensor | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    value_term: Tensor | None = None,
    multiplier: Tensor | None = None,
    scoring: Scoring | None = None,
) -> Tensor:
    """T targets per sample onto its history: q (B, T, H, D) -> (B, T, H, Dv), zeros past `lengths`.

    lengths: (B,) int64, how many targets each sample has; all T by default
    cutoffs: (B, T) int64: a target sees the occurrences at positions below its cutoff
    own:     k (B, T, Hk, D), v (B, T, Hk, Dv) of the targets themselves: each target sees its own key too, with weight 1
    """
    scoring = scoring or Scoring()
    sides = Sides.pack(space, bias, value_term, multiplier)
    targets = PackedTargets(q.shape[0], q.shape[1], lengths, q.device)
    packed = targets.pack(q)
    if cutoffs is None:
        weights = RowWeights.fold(space, sides, scoring.normaliser, q.dtype)
        out, lse = attend_rows(scoring, packed, targets.cu_seqlens, k, v, weights, space.cu_seqlens)
    else:
        out, lse = attend_before(scoring, packed, targets, cutoffs, k, v, space, sides)
    if own is not None:
        out, lse = with_own_key(scoring, packed, out, lse, targets.pack(own[0]), targets.pack(own[1]))
    return targets.unpack(out)


class PackedTargets:
    """The valid (sample, target) slots of a (B, T) grid, packed.

    cu_seqlens: (B + 1,) int32; slots: (Q,) int64 in the flattened grid; index: (Q,) int64, the target's number within its sample
    full:       every slot is valid, which is known without asking the device; packing is then a view
    """

    def __init__(self, batch: int, width: int, lengths: Tensor | None, device: torch.device) -> None:
        self.batch, self.width, self.device, self.full = batch, width, device, lengths is None
        if lengths is None:
            ends = torch.arange(batch + 1, dtype=torch.int32, device=device)
            self.cu_seqlens = ends if width == 1 else ends * width
            return
        self.lengths = lengths
        self.cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        torch.cumsum(lengths, 0, out=self.cu_seqlens[1:])
        valid = torch.arange(width, device=device) < lengths[:, None]
        self.slots = valid.reshape(-1).nonzero().squeeze(1)

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) int64: how many targets each sample has."""
        return torch.full((self.batch,), self.width, dtype=torch.int64, device=self.device)

    @cached_property
    def slots(self) -> Tensor:
        return torch.arange(self.batch * self.width, device=self.device)

    @property
    def index(self) -> Tensor:
        return self.slots % max(self.width, 1)

    @property
    def num_targets(self) -> int:
        return self.batch * self.width if self.full else self.slots.numel()

    def together(self, ranks: int) -> tuple[Tensor, PackedTargets]:
        """Layout "sequence": targets of `ranks` ranks for the same samples, gathered in rank order, brought together by sample.

        Returns (order (Q,) int64 of the packed targets, the targets of each sample in that order).
        """
        samples = self.batch // ranks
        sample = (self.slots // max(self.width, 1)) % max(samples, 1)
        totals = self.lengths.view(ranks, samples).sum(0)
        width = int(totals.max()) if samples else 0
        return sample.argsort(stable=True), PackedTargets(samples, width, totals, self.device)

    def pack(self, grid: Tensor) -> Tensor:
        """(B, T, ...) -> (Q, ...)."""
        flat = grid.reshape(self.batch * self.width, *grid.shape[2:])
        return flat if self.full else flat.index_select(0, self.slots)

    def unpack(self, rows: Tensor) -> Tensor:
        """(Q, ...) -> (B, T, ...), zeros elsewhere."""
        if self.full:
            return rows.reshape(self.batch, self.width, *rows.shape[1:])
        grid = rows.new_zeros(self.batch * self.width, *rows.shape[1:])
        return grid.index_copy(0, self.slots, rows).reshape(self.batch, self.width, *rows.shape[1:])


def attend_rows(
    scoring: Scoring, q: Tensor, cu_seqlens_q: Tensor, k: Tensor, v: Tensor, weights: RowWeights, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Packed queries onto rows with folded weights."""
    k, v, weight = weights.apply(k, v, q.shape[1], scoring.normaliser)
    return scoring.attend(q, k, v, weight, cu_seqlens_q, cu_seqlens_k)


def attend_before(
    scoring: Scoring,
    q: Tensor,
    targets: PackedTargets,
    cutoffs: Tensor,
    k: Tensor,
    v: Tensor,
    space: UniqueSpace,
    sides: Sides,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed targets onto the occurrences before their cutoffs (B, T); `positions` (M,) if not simply 0, 1, ... per sample."""
    positions = space.positions() if positions is None else positions
    visible = positions[:, None] < cutoffs[space.sample_of_occurrences()]
    row_weight, occurrence_weight = target_weights(space, sides, visible, scoring.normaliser, q.dtype)
    out, lse = scoring.attend(q, k, v, row_weight, targets.cu_seqlens, space.cu_seqlens, targets.index)
    if sides.value_term is not None:
        # sum_j p_j r_j is attention onto the occurrences with values r: the same scores, and the same denominator
        term, keys = sides.value_term, expand(k, space.segments)
        keys, term = _same_heads(keys, term, q.shape[1])
        bounds = space.cu_occurrences.int()
        extra, _ = scoring.attend(
            q, keys, term.to(v.dtype), occurrence_weight, targets.cu_seqlens, bounds, targets.index
        )
        out = out + extra
    return out, lse


def with_own_key(
    scoring: Scoring, q: Tensor, out: Tensor, lse: Tensor | None, own_k: Tensor, own_v: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Add to each packed query (Q, H, D) its own key and value (Q, Hk, ...) with weight 1."""
    alone = singletons(q.shape[0], q.device)
    own_out, own_lse = scoring.attend(q, own_k, own_v, None, alone, alone)
    if lse is None or own_lse is None:
        return out + own_out, None
    return scoring.combine(torch.stack([out, own_out]), torch.stack([lse, own_lse]))


def _same_heads(k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    if k.shape[1] == v.shape[1]:
        return k, v
    return k.repeat_interleave(num_heads // k.shape[1], 1), v.repeat_interleave(num_heads // v.shape[1], 1)
