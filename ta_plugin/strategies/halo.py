"""What stands just before a rank's pieces of a sequence: the positions that a sliding window reaches on other ranks.

Which positions those are follows from the lengths of all pieces, which every rank knows: nothing is exchanged to find out. A layer
then sends each of them once to each piece that needs it, at most `before` positions per piece and sample, whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ta_plugin.parallel import all_to_all_rows
from ta_plugin.strategies.causal_ranks import CausalRows


@dataclass(frozen=True)
class Halo:
    """This rank's pieces, each with up to `before` positions of its sample in front, E positions in all.

    plan:       the pieces
    cu_seqlens: (P * B + 1,) int64, bounds of the extended pieces, sample p * B + b as in the reader
    own:        (M,) int64, where the reader's occurrences stand among the extended
    index:      (sent,) int64, occurrences of the reader to be sent, rank by rank
    order:      (E,) int64, from what is received, followed by the reader's own, to the extended pieces
    """

    plan: CausalRows
    cu_seqlens: Tensor
    own: Tensor
    index: Tensor
    order: Tensor
    send: list[int]
    receive: list[int]

    @classmethod
    def of(cls, plan: CausalRows, before: int) -> Halo:
        """Reach `before` positions back from every piece, through as many pieces as that takes. Raises ValueError unless >= 0."""
        if before < 0:
            raise ValueError(f"before is {before}; pass 0 or more positions")
        reader, group = plan.owned.reader, plan.owned.group
        device = reader.tokens.device
        lengths, starts, places = plan.lengths.cpu(), plan.starts.cpu(), plan.places.cpu()
        # (N, P): a rank's pieces as they follow each other, and which of its pieces that is
        ordered, piece = places.sort(1)
        high = starts[places]  # (N, P, B)
        low = (high - before).clamp(min=0)
        # (N, P, B, N, P): where the part begins that piece (n, p) of sample b needs of a rank's piece, and how long it is
        source, ends = (x[ordered].movedim(2, 0)[None, None] for x in (starts, starts + lengths))
        first = torch.maximum(low[..., None, None], source)
        size = (torch.minimum(high[..., None, None], ends) - first).clamp(min=0)
        size *= (lengths[places] > 0)[..., None, None]

        mine = size[:, :, :, group.rank]  # (N, P, B, P)
        at = reader.cu_occurrences.cpu()[:-1].view(piece.shape[1], -1)[piece[group.rank]].T  # (B, P)
        index = _ranges(first[:, :, :, group.rank] - starts[ordered[group.rank]].T + at, mine)

        wanted = size[group.rank].permute(2, 0, 1, 3)  # (N, P, B, P), as it arrives
        position = _ranges(first[group.rank].permute(2, 0, 1, 3), wanted)
        sample = torch.arange(reader.num_samples).view(1, *wanted.shape[1:3], 1).expand_as(wanted)
        sample = sample.reshape(-1).repeat_interleave(wanted.reshape(-1))
        sample = torch.cat([sample.to(device), reader.sample_of_occurrences()])
        position = torch.cat([position.to(device), plan.positions()])
        by_position = position.argsort(stable=True)
        order = by_position[sample[by_position].argsort(stable=True)]
        rank_of = torch.empty_like(order).index_copy(0, order, torch.arange(order.numel(), device=device))
        bounds = torch.zeros(reader.num_samples + 1, dtype=torch.int64, device=device)
        torch.cumsum(torch.bincount(sample, minlength=reader.num_samples), 0, out=bounds[1:])
        return cls(
            plan,
            bounds,
            rank_of[rank_of.numel() - reader.num_occurrences :],
            index.to(device),
            order,
            mine.sum((1, 2, 3)).tolist(),
            wanted.sum((1, 2, 3)).tolist(),
        )

    def extend(self, values: Tensor, name: str) -> Tensor:
        """Values (M, ...) of the reader's occurrences to those of the extended pieces (E, ...). Collective, and so is its backward."""
        sent = values.index_select(0, self.index)
        received = all_to_all_rows(sent, self.send, self.receive, self.plan.owned.group, name)
        return torch.cat([received, values]).index_select(0, self.order)

    def spread(self, values: Tensor) -> Tensor:
        """Values (M, ...) at their places among the extended pieces (E, ...), zeros elsewhere."""
        return values.new_zeros(self.order.numel(), *values.shape[1:]).index_copy(0, self.own, values)


def _ranges(first: Tensor, sizes: Tensor) -> Tensor:
    """first, first + 1, ... of each of `sizes`, one after another."""
    first, sizes = first.reshape(-1), sizes.reshape(-1)
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) + (first - before).repeat_interleave(sizes)
