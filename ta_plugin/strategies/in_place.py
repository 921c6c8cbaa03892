"""Embeddings that their owner reads where they lie, and whose gradients it records for distinct rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ta_plugin.embedding import EmbeddingFn, embed_owned, reads_in_place, vocab_size_of
from ta_plugin.ops import Segments, segment_sum
from ta_plugin.ops.target import RowsInPlace
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.unique_space import UniqueSpace

Record = Callable[..., None]


@dataclass(frozen=True)
class OwnedTable:
    """Embeddings of the distinct ids among tokens (n,), at their owner: looked up once each, or read where they lie.

    Forward needs the distinct ids only to look them up, backward to add gradients up, so finding them runs beside what follows: in a
    `CapturedStep` gradients are added up there too.
    """

    distinct: UniqueSpace
    tokens: Tensor
    modules: AttentionModules

    @classmethod
    def of(cls, tokens: Tensor, end: Tensor | None, modules: AttentionModules) -> OwnedTable:
        """Of the tokens before `end` (1,)."""
        with modules.beside.work("keys", tokens, *([] if end is None else [end])):
            distinct = modules.distinct(tokens, end)
        return cls(distinct, tokens, modules)

    @cached_property
    def looked_up(self) -> Tensor:
        self.modules.beside.wait("keys")
        distinct, bounds = self.distinct, self.modules.bounds
        return embed_owned((distinct if bounds is None else bounds.owned(distinct)).tokens, self.modules.embedding_fn)

    @cached_property
    def in_place(self) -> tuple[Tensor, RowsInPlace] | None:
        """The whole table (R, E) and the rows of it that the space's rows name; None where the embedding does not offer it."""
        fn: Any = self.modules.embedding_fn
        if not _offers_rows(fn):
            return None
        table, rows = fn.in_place(self.tokens)
        if not table.is_contiguous():
            return None
        modules, record = self.modules, _record(self.distinct, self.modules, "keys")
        late = record is not None and modules.beside.lasts
        if modules.bounds is not None:
            modules.bounds.held(self.distinct, modules.beside if late else None)
        stream = modules.beside.later("keys") if late else 0
        return table, RowsInPlace(rows, self.distinct.segments, record, stream)


def read_rows(ids: Tensor, modules: AttentionModules) -> Tensor | None:
    """Embeddings (n, E) of ids (n,) that this rank owns; None where the embedding does not let them be read in place."""
    fn: Any = modules.embedding_fn
    if not _offers_rows(fn):
        return None
    with modules.beside.work("targets", ids):
        distinct = modules.distinct(ids)
    if modules.bounds is not None:
        modules.bounds.held(distinct)
    table, rows = fn.in_place(ids)
    record = _record(distinct, modules, "targets")
    if record is None:
        return table.index_select(0, rows)
    anchor = torch.empty(0, device=table.device, requires_grad=True)
    return _Read.apply(anchor, table, rows, distinct.segments, record)


def _offers_rows(fn: EmbeddingFn) -> bool:
    """Whether rows are read in place: where ids can be checked before, since a wrong one would read some row in silence."""
    return reads_in_place(fn) and vocab_size_of(fn) is not None


def _record(distinct: UniqueSpace, modules: AttentionModules, name: str) -> Record | None:
    """What takes the gradients of distinct ids; None where nobody wants them."""
    fn: Any = modules.embedding_fn
    if not torch.is_grad_enabled() or not getattr(fn, "trainable", True):
        return None
    with modules.beside.work(name, distinct.tokens):
        rows = fn.in_place(distinct.tokens)[1]
    if name != "keys" or not modules.beside.lasts:
        return lambda grad: fn.record(rows, grad.flatten(1))

    def record(grad: Tensor, *kept: Tensor) -> None:
        with modules.beside.work(name, grad, *kept):
            fn.record(rows, grad.flatten(1))
        # at the end of backward: an optimizer may follow
        torch.autograd.Variable._execution_engine.queue_callback(modules.beside.end)

    return record


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: Tensor, rows: Tensor, segments: Segments, record: Record) -> Tensor:
        ctx.segments, ctx.record = segments, record
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        ctx.record(segment_sum(grad, ctx.segments))
        return grad.new_empty(0), None, None, None, None
