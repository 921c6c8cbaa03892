"""Who owns a token, and the way there and back (RFC steps 3 and 4, completed by DESIGN section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.buckets import BOUNDS, BUCKET
from ta_plugin.ops.planning import LOCAL_ROWS, OWNERS, PARTITION
from ta_plugin.parallel import Blank, Buckets, SSPGroup, all_to_all_rows, exchange_header

_INT32_MAX = torch.iinfo(torch.int32).max
_MAX_PERMUTED = 3_037_000_499  # floor(sqrt(2**63 - 1)): the product of an id and the multiplier stays in int64


class Owners(Protocol):
    """Maps token ids to the rank that owns them."""

    def owner_of(self, ids: Tensor) -> Tensor:
        """ids (n,) int64 -> owning rank (n,) int64."""
        ...


@dataclass(frozen=True)
class HashOwners:
    """Ownership by a hash of the 64-bit id: for embeddings that bring their own storage, with any id space."""

    num_ranks: int

    def owner_of(self, ids: Tensor) -> Tensor:
        owner: Tensor = OWNERS(ids, self.num_ranks, 0, 0)
        return owner


@dataclass(frozen=True)
class PermutedRows:
    """Ownership by p = permute(id): owner = p // rows_per_rank, local row = p % rows_per_rank (DESIGN section 4).

    The permutation id -> id * multiplier mod V, with a multiplier near V / golden ratio that has no factor in common with V,
    spreads every run of neighbouring ids evenly (three-distance theorem), so frequency-sorted vocabularies balance. It does
    not depend on the number of ranks: row p of the table means the same id on 2 ranks and on 5.
    """

    vocab_size: int
    num_ranks: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= _MAX_PERMUTED:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a permuted table holds 1 to {_MAX_PERMUTED} rows. Beyond that bring an "
                "embedding_fn of your own, whose ids are owned by hash"
            )

    @property
    def rows_per_rank(self) -> int:
        """ceil(V / N): what DTensor's Shard(0) gives every rank but the last."""
        return -(-self.vocab_size // self.num_ranks)

    @property
    def multiplier(self) -> int:
        multiplier = max(1, round(self.vocab_size * (math.sqrt(5) - 1) / 2))
        while math.gcd(multiplier, self.vocab_size) != 1:
            multiplier += 1
        return multiplier

    def permute(self, ids: Tensor) -> Tensor:
        """ids (n,) int64 in [0, V) -> rows of the whole table (n,) int64, a bijection."""
        return ids * self.multiplier % self.vocab_size

    def ids_of_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `permute`."""
        return rows * pow(self.multiplier, -1, self.vocab_size) % self.vocab_size

    def owner_of(self, ids: Tensor) -> Tensor:
        """As in `Owners`; -1 for ids outside the vocabulary, which `Route.build` refuses on every rank."""
        owner: Tensor = OWNERS(ids, self.num_ranks, self.vocab_size, self.multiplier)
        return owner

    def shard(self, rank: int) -> tuple[int, int]:
        """The rows of the whole table that a rank holds: from the first to before the last."""
        first = min(rank * self.rows_per_rank, self.vocab_size)
        return first, min(first + self.rows_per_rank, self.vocab_size)

    def local_row(self, ids: Tensor, rank: int, other: int) -> Tensor:
        """The rows (n,) of ids (n,) within the shard of `rank`; `other` for ids that it does not hold."""
        first, last = self.shard(rank)
        rows: Tensor = LOCAL_ROWS(ids, first, last - first, self.vocab_size, self.multiplier, other)
        return rows


def rfc_positions(positions: Tensor, samples: Tensor, rank: int, batch_size: int, sequence_length: int) -> Tensor:
    """RFC step 3: pos = (rank * B + b) * L + pos_in_L, int64, for occurrences at `positions` of `samples` (M,) each."""
    return (rank * batch_size + samples) * sequence_length + positions


def bounds_of(sizes: Tensor) -> Tensor:
    """(n + 1,) int32: where each of n parts begins, and the end, from their sizes (n,) or (ranks, samples) int64."""
    bounds: Tensor = BOUNDS(sizes)
    return bounds


@dataclass(frozen=True)
class Route:
    """Where each of a rank's items goes, and what comes in (RFC steps 3 and 4).

    An item is an occurrence, or a distinct token when the sender has deduplicated. Sent items are ordered by (owner, sample,
    position): the RFC's rankwise tokens. Received items are ordered by (source rank, sample, position).

    order:               (n,) int64, items sorted by owner, stable
    rankwise_sizes:      (N, B) int64: how many items of sample j go to rank i (the RFC's rankwise-sizes)
    received_cu_seqlens: (sum of all ranks' B + 1,) int32: bounds of received items per sample (rank, b)
    """

    group: SSPGroup
    order: Tensor
    rankwise_sizes: Tensor
    received_cu_seqlens: Tensor
    send: list[int]
    receive: list[int]

    @classmethod
    def build(cls, owner: Tensor, cu_seqlens: Tensor, batch_sizes: list[int], group: SSPGroup) -> Route:
        """Exchange the sizes. Collective over the group.

        owner:       (n,) int64 in [0, N), the owner of each item
        cu_seqlens:  (B + 1,) bounds of this rank's samples among the items
        batch_sizes: B of every rank, from the header

        An item that nobody owns raises ValueError on every rank of several; on one rank it goes to that one.
        """
        batch = cu_seqlens.numel() - 1
        order, sizes = PARTITION(owner, cu_seqlens.long(), group.size)
        received = all_to_all_rows(sizes.reshape(-1), [batch] * group.size, batch_sizes, group, "sizes")
        bounds = bounds_of(received)
        if group.size == 1:
            send, receive = [owner.numel()], [owner.numel()]
        else:  # both reach the host in one copy and are added up there: a launch costs more than the sums
            sent, arrived = torch.cat([sizes.reshape(-1), received]).cpu().split([sizes.numel(), received.numel()])
            if bool((arrived < 0).any()):  # what one rank sent to all: every rank comes here
                exchange_header(group, [], _nobodys(owner, group.size))
            ends, running = torch.tensor(batch_sizes).cumsum(0), F.pad(arrived.cumsum(0), (1, 0))
            send = sent.view(group.size, batch).sum(1).tolist()
            receive = running[ends].diff(prepend=running[:1]).tolist()
        return cls(group, order, sizes, bounds, send, receive)

    def together(self, batch: int, pieces: int = 1) -> tuple[Tensor, Tensor]:
        """Layout "sequence", where sample b of every rank is one sample: what was received, brought together by sample.

        pieces: how many of each sample a rank reads, as samples p * B + b of its own

        Returns (order (received,) int64: by sample, then source rank and piece; cu_seqlens (B + 1,) int64 in that order).
        """
        sizes, parts = self.received_cu_seqlens.long().diff(), self.group.size * pieces
        sample = torch.arange(batch, device=sizes.device).repeat(parts)
        sample = torch.repeat_interleave(sample, sizes, output_size=sum(self.receive))
        bounds = torch.zeros(batch + 1, dtype=torch.int64, device=sizes.device)
        torch.cumsum(sizes.view(parts, batch).sum(0), 0, out=bounds[1:])
        return sample.argsort(stable=True), bounds

    def to_owners(self, values: Tensor, name: str) -> Tensor:
        """Per-item values (n, ...) to the items' owners: (received items, ...). Differentiable for floating values."""
        return all_to_all_rows(values.index_select(0, self.order), self.send, self.receive, self.group, name)

    def to_readers(self, values: Tensor, name: str) -> Tensor:
        """The way back: values of received items (received, ...) to their senders, in the senders' order (n, ...)."""
        returned = all_to_all_rows(values, self.receive, self.send, self.group, name)
        return returned.new_empty(returned.shape).index_copy(0, self.order, returned)


def _nobodys(owner: Tensor, ranks: int) -> ValueError | None:
    """What is wrong with the first item that none of the ranks owns."""
    bad = ((owner < 0) | (owner >= ranks)).nonzero()
    if not bad.numel():
        return None
    item = int(bad[0])
    return ValueError(
        f"owner[{item}] is {int(owner[item])}; it must lie in [0, {ranks}). A sharded table gives -1 for an id outside its vocabulary: "
        "pass ids of 0 or more, below vocab_size"
    )


@dataclass(frozen=True)
class BoundedRoute:
    """A route in buckets of fixed sizes, `bound` items from every rank to every owner, none of whose numbers visits the host.

    Items stand in a bucket in the senders' order, and what is left of it is filled with any. If one of a rank's buckets does not hold
    its items, that rank sends none.

    owner:      (n,) int64, the owner of each item; without one in [0, N) it goes nowhere
    cu_seqlens: (B + 1,) int32, bounds of this rank's samples among the items; what lies behind the last one goes nowhere
    most:       (1,) int64, how many items the fullest bucket should hold, once they were sent
    """

    owner: Tensor
    cu_seqlens: Tensor
    bound: int
    group: SSPGroup
    most: Tensor

    @classmethod
    def build(cls, owner: Tensor, cu_seqlens: Tensor, bound: int, group: SSPGroup) -> BoundedRoute:
        """Local."""
        return cls(owner, cu_seqlens, bound, group, owner.new_empty(1))

    def send(self, ids: Tensor, weights: Tensor, name: str, last_id: int) -> Buckets:
        """Start sending sizes (N, B) int64, how many items of sample j go to rank i, and of each item ids (n,) and weights (n, ...).

        Ids up to last_id arrive as (N, C), int32 where that holds them, and weights as (N, C, ...), int64 ones as int32; differentiable for
        floating weights. Collective.
        """
        ranks, device = self.group.size, ids.device
        sizes, places = (ranks, self.cu_seqlens.numel() - 1), (ranks, self.bound)
        wire = torch.int32 if last_id <= _INT32_MAX else torch.int64
        if weights.dim() == 1 and not weights.requires_grad:
            dtypes = (wire, weights.dtype if weights.is_floating_point() else torch.int32)
            parts = [Blank(torch.Size(sizes), torch.int64), *(Blank(torch.Size(places), x) for x in dtypes)]
            return Buckets(parts, self.group, name, lambda blank: self._write([ids, weights], blank[1:], blank[0]))
        counts = ids.new_empty(sizes)
        filled, take = torch.empty(places, dtype=wire, device=device), ids.new_empty(places)
        self._write([ids, torch.arange(ids.numel(), device=device)], [filled, take], counts)
        rows = weights.index_select(0, take.view(-1)).view(*places, *weights.shape[1:])
        return Buckets([counts, filled, rows], self.group, name)

    def _write(self, values: list[Tensor], buckets: list[Tensor], sizes: Tensor) -> None:
        BUCKET(self.owner, self.cu_seqlens, [x.contiguous() for x in values], buckets, sizes, self.most)
