"""One attention call as the strategies see it: what this rank read, and what every rank announced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ta_plugin.attention.layers import PackedTargets
from ta_plugin.attention.sides import Sides
from ta_plugin.embedding import embed_owned, lookup, owners_of
from ta_plugin.ops import Segments, expand
from ta_plugin.routing import Route
from ta_plugin.strategies.in_place import read_rows
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.unique_space import UniqueSpace

# rows (U, E), their space (OwnedRows in layout "sequence") -> rows (U, E')
Encoder = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Request:
    """One batch of one rank.

    space:       this rank's unique space
    sides:       packed per-occurrence side inputs
    targets:     the packed target slots, None for self-attention
    target_ids:  (B, T) int64, or None where the queries' embeddings are given
    queries:     (B, T, E) embeddings of the queries, or None where target_ids are given
    cutoffs:     (B, T) int64 or None
    encode:      layers to run on the distinct rows between look-up and attention, or None
    deduplicate: False for plain attention over positions: each occurrence fetches its own row
    shared:      layout "sequence": sample b of every rank is one sample, of which each reads a chunk

    Of every rank, from the header: batch_sizes B, query_counts Q, target_width the largest T, sequence_length L, and
    any_repeats, whether any sample anywhere holds a token twice.
    """

    space: UniqueSpace
    sides: Sides
    batch_sizes: list[int]
    query_counts: list[int]
    target_width: int
    sequence_length: int
    any_repeats: bool
    targets: PackedTargets | None = None
    target_ids: Tensor | None = None
    queries: Tensor | None = None
    cutoffs: Tensor | None = None
    encode: Encoder | None = None
    deduplicate: bool = True
    shared: bool = False

    def target_rows(self, modules: AttentionModules) -> Tensor:
        """Embeddings (Q, E) of the packed targets: given, or looked up at their owners. Collective in the second case."""
        assert self.targets is not None
        if self.queries is not None:
            return self.targets.pack(self.queries)
        assert self.target_ids is not None
        ids = self.targets.pack(self.target_ids)
        rows = read_rows(ids, modules) if modules.group.size == 1 and self.deduplicate else None
        if rows is None:
            table, index = fetch(ids, modules, "targets", self.deduplicate)
            rows = expand(table, index)
        return rows


def in_multiples(encode: Encoder, multiple: int) -> Encoder:
    """`encode` called with its rows rounded up to a multiple, by spare rows that change nothing (UniqueSpace.with_spare_rows)."""

    def padded(rows: Tensor, space: UniqueSpace) -> Tensor:
        if not isinstance(space, UniqueSpace):  # rows that other ranks' plans refer to keep their number
            return encode(rows, space)
        larger = space.with_spare_rows(multiple)
        return encode(larger.fill_spare_rows(rows), larger)[: space.num_rows]

    return padded


def fetch(
    ids: Tensor, modules: AttentionModules, name: str, deduplicate: bool = True, end: Tensor | None = None
) -> tuple[Tensor, Segments]:
    """Embeddings of ids (n,): distinct rows (I, E), each travelling once from its owner, and the row of each id.

    `end` is that of the space whose tokens they are. Without `deduplicate` every id fetches a row of its own. Collective, forward and
    backward.
    """
    ids_space = modules.distinct(ids, end) if deduplicate else UniqueSpace.of_occurrences(ids)
    if modules.bounds is not None:
        ids_space = modules.bounds.owned(ids_space)
    group, owners = modules.group, owners_of(modules.embedding_fn, modules.group.size)
    if group.size == 1 and deduplicate:
        return embed_owned(ids_space.tokens, modules.embedding_fn), ids_space.segments
    route = Route.build(owners.owner_of(ids_space.tokens), ids_space.cu_seqlens, [1] * group.size, group)
    return lookup(ids_space.tokens, route, modules.embedding_fn, name), ids_space.segments
