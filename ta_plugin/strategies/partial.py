"""Target attention over whatever rows a rank holds: the reader's own, or those an owner keeps for everybody."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.attention.layers import PackedTargets, attend_before, attend_rows
from ta_plugin.attention.projections import as_heads, one_dtype, with_one
from ta_plugin.attention.scoring import Scoring
from ta_plugin.attention.sides import RowWeights, Sides, target_weights
from ta_plugin.attention.target import choose_target, target_attention
from ta_plugin.ops import Segments, expand
from ta_plugin.ops.target import RowsInPlace
from ta_plugin.strategies.in_place import OwnedTable
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class Keys:
    """The key side of a target attention.

    source:   (G, E) embeddings of distinct ids, or where they are to be had
    segments: the rows (K,) of `space` -> embeddings, None where they are the same
    space:    the rows of each sample, or its occurrences folded to rows where targets have cutoffs
    weights:  folded sides, one per row of `space`; unused with cutoffs
    """

    source: Tensor | OwnedTable
    segments: Segments | None
    space: UniqueSpace
    weights: RowWeights

    @classmethod
    def owned(cls, space: UniqueSpace, modules: AttentionModules) -> Keys:
        """The rows of `space`, whose tokens this rank owns, without weights yet."""
        return cls.among(OwnedTable.of(space.tokens, space.end, modules), space)

    @classmethod
    def among(cls, table: OwnedTable, space: UniqueSpace) -> Keys:
        """The rows of `space`, whose tokens are those of the table, without weights yet."""
        return cls(table, table.distinct.segments, space, RowWeights(None, None))

    def weighted(self, weights: RowWeights) -> Keys:
        return replace(self, weights=weights)

    @property
    def table(self) -> Tensor:
        """(G, E) embeddings of distinct ids."""
        return self.source if isinstance(self.source, Tensor) else self.source.looked_up

    @property
    def num_ids(self) -> int:
        """G."""
        return self.source.shape[0] if isinstance(self.source, Tensor) else self.source.distinct.num_rows

    def spread(self, per_table_row: Tensor) -> Tensor:
        """One row of the table for each row of the space."""
        return per_table_row if self.segments is None else expand(per_table_row, self.segments)

    def rows(self) -> Segments:
        """The table row of each row of the space."""
        if self.segments is not None:
            return self.segments
        each = torch.arange(self.num_ids + 1, device=self.space.tokens.device)
        return Segments(each[:-1], each[:-1], each)


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
    modules.settle()
    results = _attend_keys(modules, q, targets, keys, cutoffs)
    modules.beside.join()
    return results


def _attend_keys(
    modules: AttentionModules, q: Tensor, targets: PackedTargets, keys: Keys, cutoffs: Cutoffs | None
) -> tuple[Tensor, Tensor | None]:
    scoring, projections = modules.scoring, modules.projections
    if not _absorbs(modules, q, keys, cutoffs):
        if projections.key is None and projections.value is None:
            return _attend_embeddings(scoring, q, targets, projections.num_kv_heads, keys, cutoffs)
        return _attend(scoring, q, targets, *projections.keys_values(keys.table), keys, cutoffs)
    # (W_k^T q).e instead of q.(W_k e): rows are read and never projected
    scale = q.shape[2] ** -0.5 if scoring.scale is None else scoring.scale
    scoring = replace(scoring, scale=scale)
    if not projections.has_bias:
        q = projections.absorb_queries(q)
        out, lse = _attend_embeddings(scoring, q, targets, 1, keys, cutoffs)
        return projections.unabsorb_values(out), lse
    q = projections.absorb_queries(q)  # the last column meets the constant 1 that stands for the biases
    if scoring.normaliser != "softmax":
        spare = -q.shape[2] % 8  # kernels read rows of whole 16 bytes
        out, _ = _attend(scoring, F.pad(q, (0, spare)), targets, with_one(keys.table, spare), None, keys, cutoffs)
        return projections.unabsorb_values(out[..., : q.shape[2]]), None
    out, lse = _attend_embeddings(scoring, q[..., :-1], targets, 1, keys, cutoffs)
    mass = torch.zeros_like(out[..., :1])
    if lse is not None:  # a key bias shifts every score of a query alike; the weights of its values add to 1
        nothing = lse == -torch.inf
        lse = lse + (scale * q[..., -1]).to(lse.dtype).masked_fill(nothing, 0.0)
        mass = mass + nothing.logical_not().unsqueeze(-1)
    return projections.unabsorb_values(torch.cat([out, mass.to(out.dtype)], -1)), lse


def _attend_embeddings(
    scoring: Scoring, q: Tensor, targets: PackedTargets, heads: int, keys: Keys, cutoffs: Cutoffs | None
) -> tuple[Tensor, Tensor | None]:
    """Queries onto the embeddings themselves, cut into heads, as keys and values; in place where embedding and kernel allow it."""
    owned = keys.source if isinstance(keys.source, OwnedTable) else None
    if owned is not None and owned.in_place is not None:
        table, rows = as_heads(owned.in_place[0], heads, "embedding"), owned.in_place[1]
        (q,) = one_dtype(q, table)
        if _gathers(scoring, q, table, None, keys, cutoffs):
            return _attend_gathered(scoring, q, targets, table, None, rows, keys, cutoffs)
    return _attend(scoring, q, targets, as_heads(keys.table, heads, "embedding"), None, keys, cutoffs)


def _attend(
    scoring: Scoring,
    q: Tensor,
    targets: PackedTargets,
    k_table: Tensor,
    v_table: Tensor | None,
    keys: Keys,
    cutoffs: Cutoffs | None,
) -> tuple[Tensor, Tensor | None]:
    """Queries onto table rows (G, Hk, D), gathered by a kernel where one covers the call, else written out per key."""
    space = keys.space
    q, *values = one_dtype(q, k_table, *([] if v_table is None else [v_table]))
    v_table = values[0] if values else None
    if _gathers(scoring, q, k_table, v_table, keys, cutoffs):
        return _attend_gathered(scoring, q, targets, k_table, v_table, keys.rows(), keys, cutoffs)
    if space.end is not None and q.is_cuda:
        raise ValueError(
            "row_bound is given, but the sizes would visit the host: no kernel of target_attention covers the call "
            f"({choose_target(None, q, k_table, v_table, scoring.activation).reason}; no score module, backend or value term)"
        )
    k = keys.spread(k_table)
    v = k if v_table is None else keys.spread(v_table)
    if cutoffs is None:
        weights = keys.weights
        if space.end is not None and weights.weight is not None:
            # on the CPU, where nothing is captured: without the spare rows
            end = int(space.end)
            k, v, weights = k[:end], v[:end], RowWeights(weights.weight[:end], None)
        return attend_rows(scoring, q, targets.cu_seqlens, k, v, weights, space.cu_seqlens)
    return attend_before(scoring, q, targets, cutoffs.cutoffs, k, v, space, cutoffs.sides, cutoffs.positions)


def _attend_gathered(
    scoring: Scoring,
    q: Tensor,
    targets: PackedTargets,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Segments | RowsInPlace,
    keys: Keys,
    cutoffs: Cutoffs | None,
) -> tuple[Tensor, Tensor | None]:
    """Queries onto the table rows that a kernel gathers: `rows` of each row of the space."""
    space, weight, q_chunk = keys.space, keys.weights.weight, None
    if cutoffs is not None:
        visible = cutoffs.positions[:, None] < cutoffs.cutoffs[space.sample_of_occurrences()]
        weight, _ = target_weights(space, cutoffs.sides, visible, scoring.normaliser, q.dtype)
        q_chunk = targets.index
    return target_attention(
        q, k_table, v_table, rows, targets.cu_seqlens, space.cu_seqlens, weight,
        scale=scoring.scale, normaliser=scoring.normaliser, activation=scoring.activation, q_chunk=q_chunk,
        max_seqlen_q=targets.width, return_lse=True,
    )  # fmt: skip


def _gathers(
    scoring: Scoring, q: Tensor, k_table: Tensor, v_table: Tensor | None, keys: Keys, cutoffs: Cutoffs | None
) -> bool:
    if scoring.score is not None or scoring.backend is not None or _has_term(keys, cutoffs):
        return False
    return choose_target(None, q, k_table, v_table, scoring.activation).name == "compiled"


def _absorbs(modules: AttentionModules, q: Tensor, keys: Keys, cutoffs: Cutoffs | None) -> bool:
    if _has_term(keys, cutoffs) or modules.scoring.score is not None:
        return False  # both live in head space, where absorbed keys never are
    samples = max(keys.space.num_samples, 1)
    pairs = q.shape[0] * -(-keys.space.num_rows // samples)
    return modules.projections.absorption_pays(keys.num_ids, q.shape[0], pairs)


def _has_term(keys: Keys, cutoffs: Cutoffs | None) -> bool:
    return keys.weights.term is not None or (cutoffs is not None and cutoffs.sides.value_term is not None)
