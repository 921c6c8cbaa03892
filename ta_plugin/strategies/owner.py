"""Strategy owner: keys and values never move; queries go to every owner, and partial results come back to merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.attention.layers import PackedTargets, with_own_key
from ta_plugin.attention.sides import RowWeights, Sides
from ta_plugin.embedding import owners_of
from ta_plugin.parallel import (
    SSPGroup,
    all_gather_rows,
    reduce_scatter_rows,
    start_all_gather_rows,
    start_all_to_all_rows,
)
from ta_plugin.routing import Route, rfc_positions
from ta_plugin.strategies.bounded_owner import bounded_owner
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.partial import Cutoffs, Keys, attend_targets
from ta_plugin.strategies.request import Request
from ta_plugin.strategies.ring import own
from ta_plugin.unique_space import UniqueSpace


def owner(request: Request, modules: AttentionModules) -> Tensor:
    """Target attention of one batch, computed where the tokens are owned: packed (Q, H, Dv). Collective, forward and backward.

    Sent per rank: ids and weights once, then (N - 1) * Q * (2 D + 1) * H elements forward and as many backward, whatever the
    lengths are.
    """
    assert request.targets is not None
    projections, group = modules.projections, modules.group
    if modules.bounds is not None and group.size > 1:
        return bounded_owner(request, modules)
    alone = group.size == 1 and request.cutoffs is None and not request.shared
    early = Keys.owned(request.space, modules) if alone else None  # first, because it runs beside all that follows
    rows = request.target_rows(modules)
    q = projections.queries(rows)
    queries = start_all_gather_rows(q, request.query_counts, group, "queries")  # needs nothing of what is done for keys
    everybody, order = _all_targets(request, group), None
    targets = everybody
    if request.shared:
        order, targets = everybody.together(group.size)
    if request.cutoffs is None:
        keys, cutoffs = _owned_rows(request, modules, q.dtype, early), None
    else:
        keys, owned_positions, sides = _owned_occurrences(request, modules, q.dtype)
        every_cutoff = _all_cutoffs(request, group)
        if order is not None:
            every_cutoff = targets.unpack(everybody.pack(every_cutoff)[order])
        cutoffs = Cutoffs(every_cutoff, owned_positions, sides)
    q_all = queries.arrive()
    if order is not None:
        q_all = q_all.index_select(0, order)
    out, lse = attend_targets(modules, q_all, targets, keys, cutoffs)
    if order is not None:  # back to the order of ranks
        out = torch.empty_like(out).index_copy(0, order, out)
        lse = None if lse is None else torch.empty_like(lse).index_copy(0, order, lse)
    out, lse = _return_partials(out, lse, request, modules)
    if modules.include_self:
        out, lse = with_own_key(modules.scoring, q, out, lse, *projections.keys_values(rows))
    return out


def _owned_rows(request: Request, modules: AttentionModules, dtype: torch.dtype, early: Keys | None) -> Keys:
    """Distinct tokens and their folded weights, at their owners."""
    if request.shared:
        owned, table, segments = own(request, modules)
        return Keys(table, segments, owned.space, owned.fold(request.sides, modules.scoring.normaliser, dtype))
    space, normaliser = request.space, modules.scoring.normaliser
    weights = RowWeights.fold(space, request.sides, normaliser, dtype)
    weight = weights.weight
    if weight is None and request.any_repeats:  # what one rank sends, every rank sends
        everywhere, wide = 0.0 if normaliser == "softmax" else 1.0, torch.promote_types(dtype, torch.float32)
        weight = torch.full((space.num_rows,), everywhere, dtype=wide, device=space.tokens.device)
    if modules.group.size == 1:
        return _keys(space, RowWeights(weight, weights.term), modules, early)
    route = _route(space.tokens, space.cu_seqlens, request, modules)
    tokens = route.to_owners(space.tokens, "keys.ids")
    received = RowWeights(
        None if weight is None else route.to_owners(weight, "keys.weights"),
        None if weights.term is None else route.to_owners(weights.term, "keys.value_terms"),
    )
    return _keys(UniqueSpace.of_rows(tokens, route.received_cu_seqlens), received, modules)


def _owned_occurrences(request: Request, modules: AttentionModules, dtype: torch.dtype) -> tuple[Keys, Tensor, Sides]:
    """Every occurrence with its position and sides, at its owner: cutoffs look at occurrences (RFC steps 3 and 4 as they stand)."""
    space, group = request.space, modules.group
    tokens = space.tokens[space.inverse]
    samples = space.sample_of_occurrences()
    batch, length, rank, offsets = max(request.batch_sizes), request.sequence_length, group.rank, None
    if request.shared:  # one sample: rank 0's chunk, then rank 1's, ...
        rank, (offsets, totals) = 0, chunk_offsets(space.cu_occurrences.diff(), group)
        length = int(totals.max()) if batch else 0
    places = space.positions() if offsets is None else space.positions() + offsets[samples]
    positions = rfc_positions(places, samples, rank, batch, length)
    route = _route(tokens, space.cu_occurrences, request, modules)
    owned_tokens = route.to_owners(tokens, "keys.ids")
    owned_positions = route.to_owners(positions, "keys.positions") % max(length, 1)
    sides = Sides(
        *(
            None if x is None else route.to_owners(x, f"keys.{name}")
            for name, x in (
                ("biases", request.sides.bias),
                ("value_terms", request.sides.value_term),
                ("multipliers", request.sides.multiplier),
            )
        )
    )
    bounds = route.received_cu_seqlens
    if request.shared:
        order, bounds = route.together(batch)
        owned_tokens, owned_positions = owned_tokens[order], owned_positions[order]
        sides = Sides(
            *(None if x is None else x.index_select(0, order) for x in (sides.bias, sides.value_term, sides.multiplier))
        )
    owned = UniqueSpace.from_packed(owned_tokens, bounds)
    if request.encode is None:
        keys = _keys(owned, RowWeights(None, None), modules)
    else:  # the rows of `own` are in the same order: by the rank that read them first, and their place there
        _, table, segments = own(request, modules)
        keys = Keys(table, segments, owned, RowWeights(None, None))
    return keys, owned_positions, sides


def chunk_offsets(lengths: Tensor, group: SSPGroup) -> tuple[Tensor, Tensor]:
    """Where this rank's chunk of each sample begins, and how long the samples are: two (B,) int64, from lengths (B,). Collective."""
    everybody = all_gather_rows(lengths, [lengths.numel()] * group.size, group, "lengths").view(group.size, -1)
    return everybody[: group.rank].sum(0), everybody.sum(0)


def _route(tokens: Tensor, cu_seqlens: Tensor, request: Request, modules: AttentionModules) -> Route:
    owners = owners_of(modules.embedding_fn, modules.group.size)
    return Route.build(owners.owner_of(tokens), cu_seqlens, request.batch_sizes, modules.group)


def _keys(space: UniqueSpace, weights: RowWeights, modules: AttentionModules, early: Keys | None = None) -> Keys:
    return (early or Keys.owned(space, modules)).weighted(weights)


def _all_cutoffs(request: Request, group: SSPGroup) -> Tensor:
    """(N * B, T) int64, in rank order."""
    assert request.cutoffs is not None
    mine = F.pad(request.cutoffs, (0, request.target_width - request.cutoffs.shape[1]))
    return all_gather_rows(mine, request.batch_sizes, group, "cutoffs")


def _all_targets(request: Request, group: SSPGroup) -> PackedTargets:
    """The targets of every rank, as if they were one batch in rank order."""
    assert request.targets is not None
    if group.size == 1:
        return request.targets
    if all(n == b * request.target_width for n, b in zip(request.query_counts, request.batch_sizes, strict=True)):
        return PackedTargets(sum(request.batch_sizes), request.target_width, None, group.device)
    lengths = all_gather_rows(request.targets.lengths, request.batch_sizes, group, "target_lengths")
    return PackedTargets(sum(request.batch_sizes), request.target_width, lengths, lengths.device)


def _return_partials(
    out: Tensor, lse: Tensor | None, request: Request, modules: AttentionModules
) -> tuple[Tensor, Tensor | None]:
    """Each owner's partial results back to the readers of the queries, merged there."""
    group, counts = modules.group, request.query_counts
    if group.size == 1:
        return out, lse
    if lse is None:
        return reduce_scatter_rows(out, counts, group, "partials"), None
    mine = [counts[group.rank]] * group.size
    sent = [
        start_all_to_all_rows(x, counts, mine, group, name) for x, name in ((out, "partials"), (lse, "partials.lse"))
    ]
    outs, lses = (x.arrive() for x in sent)
    return modules.scoring.combine(
        outs.view(group.size, mine[0], *out.shape[1:]), lses.view(group.size, mine[0], lse.shape[1])
    )
