"""Target attention over whatever rows a rank holds: the reader's own, or those an owner keeps for everybody."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ta_plugin.attention.layers import PackedTargets, attend_before, attend_rows
from ta_plugin.attention.projections import with_one
from ta_plugin.attention.sides import RowWeights, Sides
from ta_plugin.ops import Segments, expand
from ta_plugin.strategies.request import AttentionModules
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class Keys:
    """The key side of a target attention.

    table:   (G, E) embeddings of distinct ids; segments: the rows (K,) of `space` -> table rows, None where they are the same
    space:   the rows of each sample, or its occurrences folded to rows where targets have cutoffs
    weights: folded sides, one per row of `space`; unused with cutoffs
    """

    table: Tensor
    segments: Segments | None
    space: UniqueSpace
    weights: RowWeights

    def spread(self, per_table_row: Tensor) -> Tensor:
        """One row of the table for each row of the space."""
        return per_table_row if self.segments is None else expand(per_table_row, self.segments)


@dataclass(frozen=True)
class Cutoffs:
    """Which occurrences each target sees: cutoffs (B, T) against positions (M,) in their samples, with unfolded sides."""

    cutoffs: Tensor
    positions: Tensor
    sides: Sides


def attend_targets(
    modules: AttentionModules, q: Tensor, targets: PackedTargets, keys: Keys, cutoffs: Cutoffs | None
) -> tuple[Tensor, Tensor | None]:
    """Packed queries q (Q, H, D) onto the rows held here: out (Q, H, Dv), and lse (Q, H) under softmax."""
    scoring, projections, space = modules.scoring, modules.projections, keys.space
    if _absorbs(modules, q, keys, cutoffs):  # (W_k^T q).e instead of q.(W_k e): rows are read and never projected
        scoring = replace(scoring, scale=q.shape[2] ** -0.5 if scoring.scale is None else scoring.scale)
        q = projections.absorb_queries(q)
        k = v = keys.spread(with_one(keys.table))
        absorbed = True
    else:
        k, v = (keys.spread(x) for x in projections.keys_values(keys.table))
        absorbed = False
    if cutoffs is None:
        out, lse = attend_rows(scoring, q, targets.cu_seqlens, k, v, keys.weights, space.cu_seqlens)
    else:
        out, lse = attend_before(scoring, q, targets, cutoffs.cutoffs, k, v, space, cutoffs.sides, cutoffs.positions)
    return projections.unabsorb_values(out) if absorbed else out, lse


def _absorbs(modules: AttentionModules, q: Tensor, keys: Keys, cutoffs: Cutoffs | None) -> bool:
    has_term = keys.weights.term is not None or (cutoffs is not None and cutoffs.sides.value_term is not None)
    if has_term or modules.scoring.score is not None:  # both live in head space, where absorbed keys never are
        return False
    samples = max(keys.space.num_samples, 1)
    pairs = q.shape[0] * -(-keys.space.num_rows // samples)
    return modules.projections.absorption_pays(keys.table.shape[0], q.shape[0], pairs)
