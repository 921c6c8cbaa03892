"""What an attention call is made with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ta_plugin.attention.projections import HeadProjections
from ta_plugin.attention.scoring import Scoring
from ta_plugin.beside import Beside
from ta_plugin.bounds import Bounds
from ta_plugin.embedding import EmbeddingFn
from ta_plugin.parallel import SSPGroup
from ta_plugin.strategies.cost import Rates
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class AttentionModules:
    """On every rank the same: group, embedding, projections, scoring, rates, bounds on its sizes."""

    group: SSPGroup
    embedding_fn: EmbeddingFn
    projections: HeadProjections
    scoring: Scoring
    include_self: bool = False
    rates: Rates | None = None
    bounds: Bounds | None = None

    @cached_property
    def beside(self) -> Beside:
        lasting = None if self.bounds is None else self.bounds.beside
        return lasting or Beside(self.group.device)

    def settle(self) -> None:
        """In a `CapturedStep`, find out about bounds beside what follows."""
        if self.bounds is not None and self.beside.lasts:
            self.bounds.settle(self.beside)

    def distinct(self, ids: Tensor, end: Tensor | None = None) -> UniqueSpace:
        """The distinct ones of ids (n,), of the rows before `UniqueSpace.end`."""
        return UniqueSpace.from_packed(ids) if self.bounds is None else self.bounds.distinct(ids, end)
