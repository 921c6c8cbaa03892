"""What rides beside each occurrence (score bias, value term, multiplier), and how it folds onto distinct rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ta_plugin.attention.dense import Normaliser
from ta_plugin.ops import segment_logsumexp, segment_sum
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class Sides:
    """Per-occurrence side inputs, packed (M, ...); each may be None.

    bias:       (M,) or (M, H), added to the scores of an occurrence (softmax only)
    value_term: (M, Hv, Dv), added to the value of an occurrence; Hv is the number of value heads, or H
    multiplier: (M,) or (M, H), applied after the activation (without a normaliser only)
    """

    bias: Tensor | None = None
    value_term: Tensor | None = None
    multiplier: Tensor | None = None

    @classmethod
    def pack(
        cls, space: UniqueSpace, bias: Tensor | None, value_term: Tensor | None, multiplier: Tensor | None
    ) -> Sides:
        """From inputs shaped as the tokens were given, (B, L, ...) or (M, ...)."""
        return cls(*(None if x is None else space.pack(x) for x in (bias, value_term, multiplier)))

    def check(self, normaliser: Normaliser) -> None:
        """Refuse what would not be exact."""
        if normaliser == "none" and self.bias is not None:
            raise ValueError(
                "bias is given without a normaliser: a bias inside a pointwise activation does not fold onto distinct tokens; "
                "pass a multiplier applied after the activation, or make the bias part of a composite token"
            )
        if normaliser == "softmax" and self.multiplier is not None:
            raise ValueError("multiplier is given with normaliser='softmax'; pass its logarithm as bias")

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.bias, self.value_term, self.multiplier) if x is not None]


@dataclass(frozen=True)
class RowWeights:
    """Sides folded onto the rows of a unique space.

    weight: softmax: log weights (U,) or (U, H), None when all are 0; otherwise multipliers (U,) or (U, H)
    term:   (U, Hv, Dv): added to the values under softmax (a weighted mean); otherwise the sum of m_j r_j, never a mean
    """

    weight: Tensor | None
    term: Tensor | None

    @classmethod
    def fold(cls, space: UniqueSpace, sides: Sides, normaliser: Normaliser, dtype: torch.dtype) -> RowWeights:
        """Fold packed `sides` (DESIGN section 3); `dtype` is that of the rows they will meet."""
        sides.check(normaliser)
        space = space.as_packed()
        side = sides.bias if normaliser == "softmax" else sides.multiplier
        side = None if side is None else _wide(side, dtype)
        term = None if sides.value_term is None else _heads_of(sides.value_term, side)
        if normaliser == "softmax":
            weight = space.log_counts(dtype) if side is None else space.fold_bias(side)
            return cls(weight, None if term is None else space.fold_value_term(term, side))
        if side is None:
            weight = None if space.all_distinct else space.counts.to(_wide_dtype(dtype))
        else:
            weight = space.fold(side)
            term = None if term is None else term * _onto_heads(side).to(term.dtype)
        return cls(weight, None if term is None else space.fold(term))

    def apply(
        self, k: Tensor, v: Tensor, num_heads: int, normaliser: Normaliser
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and the weight still to be applied, for rows k (U, Hk, D), v (U, Hk, Dv)."""
        if self.term is None:
            return k, v, self.weight
        pointwise = normaliser == "none" and self.weight is not None
        folded = [_onto_heads(self.weight), self.term] if pointwise and self.weight is not None else [self.term]
        if max(x.shape[1] for x in folded) > v.shape[1]:  # folded per query head: write grouped keys and values out
            repeat = num_heads // v.shape[1]
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        for_values = v * folded[0].to(v.dtype) if pointwise else v
        return k, for_values + self.term.to(v.dtype), self.weight if normaliser == "softmax" else None


def target_weights(
    space: UniqueSpace, sides: Sides, visible: Tensor, normaliser: Normaliser, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights when each target sees only some occurrences: visible (M, T) bool.

    Returns per-row weights (T, U) or (T, U, H) and per-occurrence weights (T, M) or (T, M, H), as `q_chunk` weights want them.
    """
    sides.check(normaliser)
    side = sides.bias if normaliser == "softmax" else sides.multiplier
    if side is None:
        everywhere = 0.0 if normaliser == "softmax" else 1.0
        side = torch.full(visible.shape[:1], everywhere, dtype=_wide_dtype(dtype), device=visible.device)
    side = _wide(side, dtype).unsqueeze(1)  # (M, 1) or (M, 1, H)
    mask = visible if side.dim() == 2 else visible.unsqueeze(-1)
    hidden = -torch.inf if normaliser == "softmax" else 0.0
    occurrence = torch.where(mask, side, side.new_full((), hidden))
    row = (segment_logsumexp if normaliser == "softmax" else segment_sum)(occurrence, space.segments)
    return row.movedim(1, 0), occurrence.movedim(1, 0)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(_wide_dtype(torch.promote_types(x.dtype, dtype)))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _onto_heads(per_row: Tensor) -> Tensor:
    """(n,) or (n, H) to (n, 1 or H, 1)."""
    return (per_row.unsqueeze(1) if per_row.dim() == 1 else per_row).unsqueeze(-1)


def _heads_of(value_term: Tensor, side: Tensor | None) -> Tensor:
    """A value term of grouped heads written out per query head where its side input is per query head."""
    if side is None or side.dim() == 1 or side.shape[1] == value_term.shape[1]:
        return value_term
    return value_term.repeat_interleave(side.shape[1] // value_term.shape[1], 1)
