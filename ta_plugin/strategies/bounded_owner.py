"""Strategy owner on several ranks with bounded sizes: every split is fixed, so that nothing of a step visits the host."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ta_plugin.attention.layers import PackedTargets
from ta_plugin.attention.sides import RowWeights
from ta_plugin.bounded_space import BoundedSpace
from ta_plugin.bounds import Bounds
from ta_plugin.embedding import embed_owned, owners_of, vocab_size_of
from ta_plugin.ops import expand
from ta_plugin.ops.buckets import COMPACT
from ta_plugin.parallel import Buckets, start_all_gather_rows, start_all_to_all_rows
from ta_plugin.parallel.collectives import Arrived, Moving
from ta_plugin.routing import BoundedRoute, bounds_of
from ta_plugin.strategies.in_place import OwnedTable, read_rows
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.partial import Keys, attend_targets
from ta_plugin.strategies.request import Request
from ta_plugin.unique_space import UniqueSpace

_NO_ID = torch.iinfo(torch.int64).max


def bounded_owner(request: Request, modules: AttentionModules) -> Tensor:
    """What `owner` computes: packed (Q, H, Dv). Collective, forward and backward.

    Sent per rank: (N - 1) times what fills a bucket: its places, ids of targets and their rows, and as in `owner` queries and partial
    results. Whether everything fitted is told to every rank beside the partial results.
    """
    bounds, group, space = modules.bounds, modules.group, request.space
    assert bounds is not None and request.targets is not None
    asked = None
    if request.target_ids is not None:  # every owner sees all of them: they are few
        ids = request.targets.pack(request.target_ids)
        asked = start_all_gather_rows(ids, request.query_counts, group, "targets.ids")
    route = BoundedRoute.build(_owners(space.tokens, modules), space.cu_seqlens, bounds.route, group)
    moving = route.send(space.tokens, _weights(request, modules), "keys", bounds.last_id)
    bounds.sent(route.most)
    # targets are looked up while the keys travel, and travel while the keys are brought together
    answer = None if asked is None else _start_answer(asked.arrive(), modules, bounds)
    places = None if answer is None else _places(request, modules)
    everybody = PackedTargets(sum(request.batch_sizes), request.target_width, None, group.device)
    sizes, tokens, weights = moving.arrive()
    received = bounds_of(sizes)  # of the samples (rank, b)
    tokens = COMPACT(tokens, received, tokens.dtype == torch.int32)
    table = OwnedTable.of(tokens, received[-1:], modules)  # before all else, because it runs beside that
    modules.settle()
    _ = table.in_place  # which rows of the table: while queries travel
    with modules.beside.work("targets", tokens, received):  # what nobody reads here
        owned = BoundedSpace.of_rows(tokens, received)
    keys = Keys.among(table, owned)
    q = modules.projections.queries(_target_rows(request, answer, places))
    queries = start_all_gather_rows(q, request.query_counts, group, "queries")
    weight = _as_weights(COMPACT(weights, received), owned, modules, q.dtype)
    out, lse = attend_targets(modules, queries.arrive(), everybody, keys.weighted(RowWeights(weight, None)), None)
    return _return_partials(out, lse, modules, bounds)


def _owners(ids: Tensor, modules: AttentionModules) -> Tensor:
    """The rank that owns each of ids (n,); for wrong ones some rank or, where the embedding has a vocabulary and does not tell, none."""
    fn, ranks, bounds = modules.embedding_fn, modules.group.size, modules.bounds
    assert bounds is not None
    owner = owners_of(fn, ranks).owner_of(bounds.within(ids))
    if hasattr(fn, "owner_of") and vocab_size_of(fn) is None:
        bounds.owners(owner, ranks)
    return owner


def _weights(request: Request, modules: AttentionModules) -> Tensor:
    """Folded sides (U,) or (U, H), or where there are none how often each row occurs, (U,) int64."""
    if not request.sides.tensors():
        return request.space.counts
    weight = RowWeights.fold(request.space, request.sides, modules.scoring.normaliser, torch.float32).weight
    assert weight is not None
    return weight


def _as_weights(received: Tensor, owned: UniqueSpace, modules: AttentionModules, dtype: torch.dtype) -> Tensor:
    if received.is_floating_point():
        return received
    if modules.scoring.normaliser != "softmax":
        return received.to(torch.promote_types(dtype, torch.float32))
    weight = replace(owned, counts=received).log_counts(dtype)
    assert weight is not None
    return weight


def _start_answer(ids: Tensor, modules: AttentionModules, bounds: Bounds) -> Moving | Arrived:
    """Rows of the ids (N * Q,) that all ranks ask for, on their way back: from each owner (Q, E), right for those it owns."""
    group = modules.group
    mine = _owners(ids, modules) == group.rank
    if ids.numel():  # in place of the others' ids the least of its own, which they give no gradient
        least = torch.where(mine, ids, _NO_ID).amin()
        ids = torch.where(mine, ids, torch.where(least < _NO_ID, least, bounds.filler))
    rows = read_rows(ids, modules)
    if rows is None:
        distinct = bounds.owned(bounds.distinct(ids))
        rows = expand(embed_owned(distinct.tokens, modules.embedding_fn), distinct.segments)
    even = [ids.numel() // group.size] * group.size
    return start_all_to_all_rows(rows, even, even, group, "targets.rows")


def _places(request: Request, modules: AttentionModules) -> Tensor:
    """Where the embeddings of the packed targets are in the answer, (Q,) int64."""
    assert request.targets is not None and request.target_ids is not None
    ids = request.targets.pack(request.target_ids)
    owner = _owners(ids, modules).clamp(0, modules.group.size - 1)  # an answer to an id that nobody owns is not used
    return owner * ids.numel() + torch.arange(ids.numel(), device=ids.device)


def _target_rows(request: Request, answer: Moving | Arrived | None, places: Tensor | None) -> Tensor:
    """Embeddings (Q, E) of the packed targets."""
    if answer is not None and places is not None:
        return answer.arrive().index_select(0, places)
    assert request.targets is not None and request.queries is not None
    return request.targets.pack(request.queries)


def _return_partials(out: Tensor, lse: Tensor | None, modules: AttentionModules, bounds: Bounds) -> Tensor:
    """Each owner's partial results back to the readers of the queries, merged there, and its word on whether something did not fit."""
    ranks = modules.group.size
    parts = [x.view(ranks, -1, *x.shape[1:]) for x in ([out] if lse is None else [out, lse])]
    parts.append(bounds.wrong().expand(ranks, 1))
    *merged, wrong = Buckets(parts, modules.group, "partials").arrive()
    bounds.hear(wrong)
    outs, *lses = (x.contiguous() for x in merged)  # once, for forward and backward
    return modules.scoring.combine(outs, lses[0] if lses else None)[0]
