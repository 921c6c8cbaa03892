"""Sharding a model's token embeddings over an SSP group: tables built whole, and nn.Embedding modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ta_plugin.embedding import ShardedTokenEmbedding, SharedEmbedding, lookup
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.routing import Route
from ta_plugin.row_optimizers import RowOptimizer
from ta_plugin.tokenized_attention import TokenizedAttention
from ta_plugin.unique_space import UniqueSpace


class RoutedTokenEmbedding(nn.Module):
    """In place of an nn.Embedding: ids (...) int64 to rows (..., D) from a table sharded over the ranks of a group.

    Each distinct id of a rank travels once. Every rank of the group must call it equally often, with any number of ids. Raises
    ValueError on every rank when one of them passes an id outside [0, V).
    """

    def __init__(self, table: ShardedTokenEmbedding) -> None:
        super().__init__()
        self.table = table

    @property
    def embedding_dim(self) -> int:
        return self.table.embedding_dim

    @property
    def num_embeddings(self) -> int:
        return self.table.vocab_size

    def forward(self, ids: Tensor) -> Tensor:
        group = self.table.group
        distinct, error = None, None
        try:
            distinct = UniqueSpace.from_packed(ids.reshape(-1))
            self._check(distinct.tokens)
        except ValueError as failure:
            error = failure
        exchange_header(group, [], error)
        assert distinct is not None
        owners = self.table.owner_of(distinct.tokens)
        route = Route.build(owners, distinct.cu_seqlens, [1] * group.size, group)
        rows = lookup(distinct.tokens, route, self.table, "embedding")
        return distinct.expand(rows).reshape(*ids.shape, self.embedding_dim)

    def _check(self, distinct: Tensor) -> None:
        bad = distinct[(distinct < 0) | (distinct >= self.num_embeddings)]
        if bad.numel():
            raise ValueError(f"id {int(bad[0])} is outside the vocabulary; ids lie in [0, {self.num_embeddings})")


def table_of(attention: TokenizedAttention) -> object:
    """The embedding an attention looks tokens up in, whether or not it registers it."""
    embedding = attention.embedding_fn
    return embedding.table if isinstance(embedding, SharedEmbedding) else embedding


def set_table(attention: TokenizedAttention, table: ShardedTokenEmbedding) -> None:
    """Give an attention another table, registered where the old one was."""
    shared = isinstance(attention.embedding_fn, SharedEmbedding)
    del attention.embedding_fn
    attention.embedding_fn = SharedEmbedding(table) if shared else table


def why_not_shardable(embedding: nn.Embedding) -> str | None:
    """What keeps an nn.Embedding from being sharded without changing what it computes, or None."""
    if embedding.max_norm is not None:
        return "it renormalises rows (max_norm)"
    if embedding.scale_grad_by_freq:
        return "it scales gradients by frequency within a rank's batch (scale_grad_by_freq)"
    if embedding.padding_idx is not None:
        return "its padding row must not train (padding_idx); exclude padding by lengths instead"
    if not embedding.weight.requires_grad:
        return "it is frozen"
    if hasattr(embedding.weight, "ds_id"):
        return "zero.Init partitioned it; build it outside that context"
    return None


def shard(embedding: nn.Embedding, group: SSPGroup, optimizer: RowOptimizer | None) -> ShardedTokenEmbedding:
    """A table with this rank's rows of `embedding`, whose weight must be the same on every rank."""
    weight = embedding.weight.detach()
    table = ShardedTokenEmbedding(
        embedding.num_embeddings,
        embedding.embedding_dim,
        group,
        optimizer=optimizer,
        init_std=0.0,
        dtype=torch.promote_types(weight.dtype, torch.float32),  # rows are their own master copy
        device=group.device,
    )
    table.load_dense(weight.to(table.rows))
    return table


def drop_parameters(optimizer: object, parameters: list[object] | None, gone: set[int]) -> None:
    """Remove replaced parameters, by id, from an optimizer's groups and from a list of parameters or groups, in place."""
    param_groups = getattr(optimizer, "param_groups", None)
    for holder in (param_groups, parameters):
        for group in holder or []:
            if isinstance(group, dict):
                group["params"] = [p for p in group["params"] if id(p) not in gone]
    if parameters is not None:
        parameters[:] = [p for p in parameters if isinstance(p, dict) or id(p) not in gone]
