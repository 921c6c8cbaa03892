"""Strategy gather: distinct embeddings go back to each reader once, and the reader attends over its own rows."""

from __future__ import annotations

from torch import Tensor

from ta_plugin.attention.layers import attend_rows, with_own_key
from ta_plugin.attention.sides import RowWeights
from ta_plugin.ops import expand
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.partial import Cutoffs, Keys, attend_targets
from ta_plugin.strategies.request import Request, fetch


def gather(request: Request, modules: AttentionModules) -> Tensor:
    """Attention of one batch at its reader. Collective over the group, forward and backward.

    Self-attention: rows (U, H, Dv). With targets: packed (Q, H, Dv). Plain attention over positions is this strategy on a space of
    occurrences that does not deduplicate what it fetches.
    """
    space, projections, scoring = request.space, modules.projections, modules.scoring
    table, segments = fetch(space.tokens, modules, "history", request.deduplicate, space.end)
    of_rows = segments if request.encode is None else None
    if request.encode is not None:
        table = request.encode(expand(table, segments), space)
    weights = RowWeights(None, None)  # with cutoffs each target folds the sides for itself
    if request.cutoffs is None:
        weights = RowWeights.fold(space, request.sides, scoring.normaliser, table.dtype)
    if request.targets is None:
        # projections run once per id of the rank, before they spread to the samples that share it
        q, (k, v) = projections.queries(table), projections.keys_values(table)
        if of_rows is not None:
            q, k, v = expand(q, of_rows), expand(k, of_rows), expand(v, of_rows)
        out, _ = attend_rows(scoring, q, space.cu_seqlens, k, v, weights, space.cu_seqlens)
        return out
    rows = request.target_rows(modules)
    q = projections.queries(rows)
    cutoffs = None
    if request.cutoffs is not None:
        cutoffs = Cutoffs(request.cutoffs, space.positions(), request.sides)
    out, lse = attend_targets(modules, q, request.targets, Keys(table, of_rows, space, weights), cutoffs)
    if modules.include_self:
        out, _ = with_own_key(scoring, q, out, lse, *projections.keys_values(rows))
    return out
