"""Layout "sequence": samples that every rank reads a chunk of, and their distinct tokens where they are owned.

The routing is that of layout "sample"; only the sample id differs: here sample b of every rank is one sample (DESIGN section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ta_plugin.attention.dense import Normaliser
from ta_plugin.attention.sides import RowWeights, Sides
from ta_plugin.ops import expand, segment_logsumexp, segment_sum
from ta_plugin.parallel import SSPGroup, all_gather_rows
from ta_plugin.routing import Owners, Route
from ta_plugin.strategies.cost import Rates
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class OwnedRows:
    """What a rank owns of shared samples, and the way from its chunks there and back.

    space:      the owned rows (U_n) of each of the B samples; counts are multiplicities over all chunks. It maps no occurrences:
                its rows stand for themselves
    reader:     the unique space of this rank's chunks
    route:      reader's rows -> owners
    by_sample:  (received,) int64, what was received, brought together by sample
    merged:     received rows in that order -> owned rows; counts (received,) int64: how often each occurs at its reader
    everybody:  (N, B + 1) int64 on the host, cu_seqlens of every rank's owned rows
    any_repeats: whether any sample holds a token twice; otherwise every log weight of plain attention is 0
    rates:      what the cost model assumes when it chooses how keys travel; by default those of the device

    Work is divided by hashing: each rank holds about 1/N of the distinct tokens of every sample.
    """

    group: SSPGroup
    space: UniqueSpace
    reader: UniqueSpace
    route: Route
    by_sample: Tensor
    merged: UniqueSpace
    counts: Tensor
    everybody: Tensor
    any_repeats: bool
    rates: Rates | None = None
    pieces: int = 1

    @classmethod
    def of(
        cls,
        reader: UniqueSpace,
        owners: Owners,
        group: SSPGroup,
        rates: Rates | None = None,
        *,
        pieces: int = 1,
    ) -> OwnedRows:
        """Route the distinct tokens of this rank's chunks, with their counts. Collective over the group.

        reader: of B samples, the same B on every rank, each of any length; packed documents count as samples
        pieces: how many pieces of each sample every rank reads: the reader's samples are then p * B + b (`causal_over_ranks`)
        """
        batch = reader.num_samples // pieces
        route = Route.build(owners.owner_of(reader.tokens), reader.cu_seqlens, [pieces * batch] * group.size, group)
        tokens = route.to_owners(reader.tokens, "shared.ids")
        counts = route.to_owners(reader.counts, "shared.counts")
        by_sample, bounds = route.together(batch, pieces)
        merged = UniqueSpace.from_packed(tokens[by_sample], bounds)
        space = UniqueSpace.of_occurrences(merged.tokens, cu_seqlens=merged.cu_seqlens)
        counts = counts[by_sample]
        totals = torch.zeros_like(merged.counts).index_add(0, merged.inverse, counts)  # exact beyond what a float holds
        repeats = (totals > 1).any().long()
        known = torch.cat([merged.cu_seqlens.long(), repeats[None]])
        gathered = (
            all_gather_rows(known, [known.numel()] * group.size, group, "shared.bounds").view(group.size, -1).cpu()
        )
        return cls(
            group,
            replace(space, counts=totals),
            reader,
            route,
            by_sample,
            merged,
            counts,
            gathered[:, :-1],
            bool(gathered[:, -1].any()),
            rates,
            pieces,
        )

    @property
    def rows_of_ranks(self) -> list[int]:
        """How many rows each rank owns."""
        return self.everybody[:, -1].tolist()

    @cached_property
    def every_count(self) -> Tensor:
        """Multiplicities of every rank's owned rows in rank order (U,) int64. Collective the first time; layers share it."""
        return all_gather_rows(self.space.counts, self.rows_of_ranks, self.group, "shared.every_count")

    @staticmethod
    def weights_of_counts(counts: Tensor, normaliser: Normaliser, dtype: torch.dtype) -> Tensor:
        """Log multiplicities under softmax, multiplicities otherwise."""
        return counts.to(dtype).log() if normaliser == "softmax" else counts.to(dtype)

    def to_owners(self, values: Tensor, name: str) -> Tensor:
        """Values (U, ...) of the reader's rows, at the owners, in the order of `merged`'s members. Collective."""
        return self.route.to_owners(values, name).index_select(0, self.by_sample)

    def to_readers(self, rows: Tensor, name: str) -> Tensor:
        """Owned rows (U_n, ...) to every reader's rows (U, ...), each once per reader that holds its token. Collective."""
        return self._send_back(expand(rows, self.merged.segments), name)

    def owner_of_reader_rows(self) -> Tensor:
        """(U,) int64: the rank that owns each of the reader's rows."""
        device = self.reader.tokens.device
        ranks = torch.arange(self.group.size, device=device)
        owner = torch.repeat_interleave(ranks, torch.tensor(self.route.send, device=device))
        return torch.empty_like(owner).index_copy(0, self.route.order, owner)

    def numbers_to_readers(self, numbers: Tensor, name: str) -> Tensor:
        """`to_readers` of integers (U_n,)."""
        return self._send_back(numbers[self.merged.inverse], name)

    def _send_back(self, received: Tensor, name: str) -> Tensor:
        unsorted = received.new_empty(received.shape).index_copy(0, self.by_sample, received)
        return self.route.to_readers(unsorted, name)

    def to_positions(self, rows: Tensor, name: str = "rows") -> Tensor:
        """Owned rows (U_n, ...) to the positions of this rank's chunks, as `UniqueSpace.expand`. Collective."""
        return self.reader.expand(self.to_readers(rows, name))

    def together(self) -> tuple[Tensor, Tensor]:
        """Rows of all ranks, gathered in rank order, brought together by sample: (order (U,) int64, cu_seqlens (B + 1,) int32)."""
        sizes = self.everybody.diff(dim=1)
        sample = torch.arange(sizes.shape[1]).repeat(sizes.shape[0])
        order = torch.repeat_interleave(sample, sizes.reshape(-1)).argsort(stable=True)
        bounds = torch.zeros(sizes.shape[1] + 1, dtype=torch.int32)
        torch.cumsum(sizes.sum(0), 0, out=bounds[1:])
        return order.to(self.space.tokens.device), bounds.to(self.space.tokens.device)

    def fold(self, sides: Sides, normaliser: Normaliser, dtype: torch.dtype) -> RowWeights:
        """Per-occurrence sides of every rank's chunks, packed (M, ...), folded onto the owned rows. Collective.

        Folds associate: each reader folds its own occurrences, and the owner folds what the readers send, by log-sum-exp, by
        means weighted with softmax(log weight), or by sums.
        """
        wide = torch.promote_types(dtype, torch.float32)
        if not sides.tensors():
            if not self.any_repeats:
                return RowWeights(None, None)
            return RowWeights(self.weights_of_counts(self.space.counts, normaliser, wide), None)
        mine = RowWeights.fold(self.reader, sides, normaliser, dtype)
        weight = mine.weight
        if weight is None:  # one occurrence each here, but perhaps more elsewhere
            weight = self.weights_of_counts(self.reader.counts, normaliser, wide)
        weight = self.to_owners(weight, "shared.weights")
        term = None if mine.term is None else self.to_owners(mine.term, "shared.value_terms")
        if normaliser == "none":
            segments = self.merged.segments
            return RowWeights(segment_sum(weight, segments), None if term is None else segment_sum(term, segments))
        folded = None if term is None else self.merged.fold_value_term(term, weight)
        return RowWeights(segment_logsumexp(weight, self.merged.segments), folded)
