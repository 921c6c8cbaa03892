"""Strategy ring (layout "sequence"): every layer runs on owned rows, and keys and values circulate.

Sent per rank and layer: (N - 1) hops of Hk * (D + Dv) elements per owned row forward, and as many backward. Summed over ranks
that is (N - 1) * U * 2 D for heads of equal width: distinct rows U, where ring attention over positions sends L.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ta_plugin.attention.layers import attend_rows, self_attention
from ta_plugin.attention.scoring import Scoring
from ta_plugin.attention.sides import RowWeights, Sides
from ta_plugin.embedding import embed_owned, owners_of
from ta_plugin.ops import Segments, expand
from ta_plugin.parallel import Hop, all_gather_rows
from ta_plugin.strategies.cost import Rates, circulates
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.owned import OwnedRows
from ta_plugin.strategies.request import Request
from ta_plugin.unique_space import UniqueSpace

Exchange = Literal["ring", "all_gather"]


def ring(request: Request, modules: AttentionModules) -> tuple[OwnedRows, Tensor]:
    """Self-attention of shared samples on the rows this rank owns: (U_n, H, Dv), and the way back to the readers.

    Collective over the group, forward and backward.
    """
    owned, table, segments = own(request, modules)
    q, (k, v) = modules.projections.queries(table), modules.projections.keys_values(table)
    if segments is not None:  # projected once per id, before they spread to the samples that share it
        q, k, v = (expand(x, segments) for x in (q, k, v))
    out, _ = ring_attention(owned, q, k, v, request.sides, modules.scoring)
    return owned, out


def ring_attention(
    owned: OwnedRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: Sides | None = None,
    scoring: Scoring | None = None,
    *,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Owned rows q (U_n, H, D) onto the rows k (U_n, Hk, D), v (U_n, Hk, Dv) of every rank: out (U_n, H, Dv), lse (U_n, H).

    Equal to attention over all positions of all chunks, read at any occurrence of each token. No lse without a normaliser.

    sides:    of the occurrences in this rank's chunks, packed
    exchange: "ring": a block of keys at a time, the next one under way meanwhile; "all_gather": all at once, which is cheaper
              where there are few; by default the cost model decides (`cost.circulates`), alike on every rank

    Collective over the group, forward and backward.
    """
    scoring, sides = scoring or Scoring(), sides or Sides()
    weights = owned.fold(sides, scoring.normaliser, q.dtype)
    k, v, weight = weights.apply(k, v, q.shape[1], scoring.normaliser)
    rest = RowWeights(weight, None)
    bounds, rows, group = owned.everybody.to(q.device, torch.int32), owned.rows_of_ranks, owned.group
    mine = owned.space.cu_seqlens
    if group.size == 1:
        return attend_rows(scoring, q, mine, k, v, rest, mine)
    every_weight = weight
    if weight is not None and sides.tensors():
        every_weight = all_gather_rows(weight, rows, group, "ring.weights")
    elif weight is not None:
        every_weight = owned.weights_of_counts(owned.every_count, scoring.normaliser, weight.dtype)
    if exchange is None:
        widths = [x.shape[1] * x.shape[2] * x.element_size() for x in (k, v)]
        pairs = q.shape[1] * (q.shape[2] + v.shape[2]) * _pairs(owned)
        rates = owned.rates or Rates.of(q.device)
        many = circulates(sum(rows) * sum(widths), 2 * pairs, group.size, rates)
        exchange = "ring" if many else "all_gather"
    if exchange == "all_gather":
        order, together = owned.together()
        k, v = (
            all_gather_rows(x, rows, group, f"ring.{name}").index_select(0, order)
            for name, x in (("keys", k), ("values", v))
        )
        every = None if every_weight is None else every_weight.index_select(0, order)
        return attend_rows(scoring, q, mine, k, v, RowWeights(every, None), together)
    blocks = [None] * group.size if every_weight is None else list(every_weight.split(rows))
    partials: list[tuple[Tensor, Tensor | None] | None] = [None] * group.size
    for step in range(group.size):
        source = (group.rank - step) % group.size
        hop = None
        if step + 1 < group.size:
            hop = Hop((k, v), rows[source - 1], group, ("ring.keys", "ring.values"))
        partials[source] = attend_rows(scoring, q, mine, k, v, RowWeights(blocks[source], None), bounds[source])
        if hop is not None:
            k, v = hop.arrive()
    found = [p for p in partials if p is not None]  # in rank order on every rank
    lses = [lse for _, lse in found if lse is not None]
    return scoring.combine(torch.stack([out for out, _ in found]), torch.stack(lses) if lses else None)


def row_attention(
    space: UniqueSpace | OwnedRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    value_term: Tensor | None = None,
    multiplier: Tensor | None = None,
    scoring: Scoring | None = None,
) -> Tensor:
    """`self_attention` of a layer on distinct rows in either layout: what an `encode` calls with the space it was given.

    Sides are per occurrence of what this rank read, in both layouts.
    """
    sides = {"bias": bias, "value_term": value_term, "multiplier": multiplier}
    if isinstance(space, UniqueSpace):
        return self_attention(space, q, k, v, scoring=scoring, **sides)
    return ring_attention(space, q, k, v, Sides.pack(space.reader, **sides), scoring)[0]


def own(request: Request, modules: AttentionModules) -> tuple[OwnedRows, Tensor, Segments | None]:
    """Route a batch of shared samples to its owners: the rows, their embeddings and the layers of `encode` on them.

    Returns (owned, table (G, E), segments: owned rows -> table rows, or None where they are the same). Collective.
    """
    owners = owners_of(modules.embedding_fn, modules.group.size)
    owned = OwnedRows.of(request.space, owners, modules.group, modules.rates)
    distinct = UniqueSpace.from_packed(owned.space.tokens)  # each owned id is looked up once for all samples
    table = embed_owned(distinct.tokens, modules.embedding_fn)
    if request.encode is None:
        return owned, table, distinct.segments
    return owned, request.encode(expand(table, distinct.segments), owned), None


def _pairs(owned: OwnedRows) -> float:
    """Query-key pairs of the average rank."""
    sizes = owned.everybody.diff(dim=1).double().sum(0)
    return float(sizes.square().sum()) / owned.group.size
