"""Causal attention in layout "sequence": queries stay with their reader, keys and prefix counts come from all ranks.

For a piece of a sample that begins at position s, everything before s is one weight per distinct row, log(count before s), the
same for every query of the piece; the piece itself is causal attention on one rank (DESIGN section 5, with the piece as chunk).
Owners know every piece's counts, so each sends a reader the sums before its pieces, once per batch: O(U) integers. Keys and
values are gathered per layer: U * 2 D elements in all, where they circulated there would be N partial results of every position.
Pieces lie zigzag, rank r reads pieces r and 2 N - 1 - r of 2 N, so that each rank has a short prefix and a long one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ta_plugin.attention.causal import causal_attention
from ta_plugin.attention.merge import merge
from ta_plugin.attention.weighted import weighted_attention
from ta_plugin.ops import Segments, expand
from ta_plugin.parallel import SSPGroup, all_gather_rows, all_to_all_rows, exchange_header
from ta_plugin.routing import Owners
from ta_plugin.strategies.owned import OwnedRows
from ta_plugin.unique_space import UniqueSpace


def zigzag(ranks: int) -> list[tuple[int, ...]]:
    """The places of every rank's pieces in the sequence: 2 N pieces, rank r has r and 2 N - 1 - r, as Megatron's CP."""
    return [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]


def pieces_of(tokens: Tensor, lengths: Tensor) -> UniqueSpace:
    """A rank's pieces, tokens (B, P, L) int64 and lengths (B, P) int64, as the reader of `CausalRows`: samples p * B + b."""
    batch, pieces, length = tokens.shape
    return UniqueSpace.from_padded(tokens.transpose(0, 1).reshape(pieces * batch, length), lengths.T.reshape(-1))


@dataclass(frozen=True)
class Prefix:
    """What lies before one piece of this rank, of every sample.

    rows:       (K,) int64, rows of all ranks (gathered in rank order) that occur before the piece, sample by sample
    cu_seqlens: (B + 1,) int32, bounds of each sample among them
    counts:     (K,) int64, how often
    """

    rows: Tensor
    cu_seqlens: Tensor
    counts: Tensor


@dataclass(frozen=True)
class CausalRows:
    """A batch of shared samples, planned for causal layers.

    owned:    the distinct rows this rank owns; their keys and values are functions of the token
    local:    reader's rows -> rows of all ranks in rank order
    prefixes: one per piece of this rank
    """

    owned: OwnedRows
    local: Segments
    prefixes: list[Prefix]

    @classmethod
    def of(
        cls, reader: UniqueSpace, owners: Owners, group: SSPGroup, places: Sequence[Sequence[int]] | None = None
    ) -> CausalRows:
        """Route the pieces of this rank and learn what lies before each. Collective over the group.

        reader: P * B samples, sample p * B + b being piece p of sample b (`pieces_of`); any lengths
        places: of every rank's pieces in the sequence, by default `zigzag`

        Raises ValueError on every rank unless places are 0 .. N * P - 1 and ranks agree on them and on B.
        """
        where = zigzag(group.size) if places is None else [tuple(p) for p in places]
        pieces = max((len(p) for p in where), default=0)
        error: ValueError | None = None
        if len(where) != group.size or sorted(chain(*where)) != list(range(group.size * pieces)):
            error = ValueError(
                f"places are {where}; pass {group.size} lists of equal length that hold each of 0 .. N * P - 1 once"
            )
        elif reader.num_samples % pieces:
            error = ValueError(
                f"reader has {reader.num_samples} samples; pass every sample's {pieces} pieces, empty ones with length 0"
            )
        headers = exchange_header(group, [reader.num_samples, zlib.crc32(repr(where).encode())], error)
        if any(header != headers[0] for header in headers):
            raise ValueError(
                "ranks differ in samples or places; pass the same samples and the same places on every rank"
            )
        owned = OwnedRows.of(reader, owners, group, pieces=pieces)
        rows, device = owned.rows_of_ranks, reader.tokens.device
        first = sum(rows[: group.rank])
        index = owned.numbers_to_readers(
            torch.arange(first, first + owned.space.num_rows, device=device), "causal.rows"
        )
        before = _counts_before(owned, where)
        order, bounds = owned.together()
        prefixes = []
        for counts in before.index_select(0, order).unbind(1):
            seen = counts > 0
            ends = torch.zeros(seen.numel() + 1, dtype=torch.int32, device=device)
            torch.cumsum(seen, 0, out=ends[1:])
            prefixes.append(Prefix(order[seen], ends[bounds.long()], counts[seen]))
        return cls(owned, Segments.from_index(index, sum(rows)), prefixes)


def causal_over_ranks(
    plan: CausalRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each position of this rank's pieces onto all positions up to it, on whatever rank: out (M, H, Dv), lse (M, H).

    Equal to plain causal attention over the whole samples wherever equal tokens have equal keys and values.

    q:     (M, H, D), a query per occurrence of the reader, packed in its order (`plan.owned.reader.pack`)
    k, v:  (U_n, Hk, D), (U_n, Hk, Dv) of the owned rows, `plan.owned.space`
    chunk: of `causal_attention` within the piece

    Collective over the group, forward and backward. Sent per rank: (N - 1) * U_n * (D + Dv) * Hk elements each way.
    """
    owned, group = plan.owned, plan.owned.group
    k, v = (
        all_gather_rows(x, owned.rows_of_ranks, group, f"causal.{name}") for name, x in (("keys", k), ("values", v))
    )
    reader = owned.reader
    here = causal_attention(
        reader,
        q,
        expand(k, plan.local),
        expand(v, plan.local),
        scale=scale,
        chunk=chunk,
        backend=backend,
        return_lse=True,
    )
    batch = reader.num_samples // owned.pieces
    before = []
    for piece, prefix in enumerate(plan.prefixes):
        bounds = reader.cu_occurrences[piece * batch : (piece + 1) * batch + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        before.append(
            weighted_attention(
                q[first:last],
                k.index_select(0, prefix.rows),
                v.index_select(0, prefix.rows),
                prefix.counts.to(torch.promote_types(q.dtype, torch.float32)).log(),
                (bounds - first).int(),
                prefix.cu_seqlens,
                scale=scale,
                return_lse=True,
                backend=backend,
            )
        )
    out, lse = (torch.cat(parts) for parts in zip(*before, strict=True))
    return merge(torch.stack([out, here[0]]), torch.stack([lse, here[1]]))


def _counts_before(owned: OwnedRows, places: list[tuple[int, ...]]) -> Tensor:
    """(U, P) int64: how often each row of every rank, in rank order, occurs before each of this rank's pieces. Collective."""
    group, space, pieces = owned.group, owned.space, owned.pieces
    device = space.tokens.device
    place = torch.tensor(places, device=device).reshape(-1)
    place = place.repeat_interleave(space.num_samples)  # of each received (rank, piece, sample)
    place = torch.repeat_interleave(
        place, owned.route.received_cu_seqlens.long().diff(), output_size=owned.counts.numel()
    )
    counts = torch.zeros(group.size * pieces, space.num_rows, dtype=torch.int64, device=device)
    counts.index_put_((place[owned.by_sample], owned.merged.inverse), owned.counts)  # each pair once
    before = counts.cumsum(0) - counts
    mine = before[torch.tensor(places, device=device)]  # (N, P, U_n): what each rank asks for
    sent = mine.transpose(1, 2).reshape(group.size * space.num_rows, pieces)
    return all_to_all_rows(sent, [space.num_rows] * group.size, owned.rows_of_ranks, group, "causal.counts")
