"""Causal attention in layout "sequence": queries stay with their reader, keys and prefix counts come from all ranks.

For a piece of a sample that begins at position s, everything before s is one weight per distinct row, log(count before s), the
same for every query of the piece; the piece itself is causal attention on one rank (DESIGN section 5, with the piece as chunk).
A decay turns the counts into sums decayed up to s, and the rest of it, from s to the query, shifts that part's log-sum-exp.
Owners know every piece's counts, so each sends a reader the sums before its pieces, once per batch: O(U) integers. Keys and
values are gathered per layer: U * 2 D elements in all, where they circulated there would be N partial results of every position.
Pieces lie zigzag, rank r reads pieces r and 2 N - 1 - r of 2 N, so that each rank has a short prefix and a long one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ta_plugin.attention.causal import causal_attention
from ta_plugin.attention.chunks import CausalChunks
from ta_plugin.attention.merge import merge
from ta_plugin.attention.weighted import weighted_attention
from ta_plugin.ops import Segments, expand, segment_logsumexp
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
    places:   (N, P) int64, the place of every rank's pieces in the sequence
    lengths:  (N * P, B) int64, of the pieces of each sample in the order of the sequence
    chunks:   of the reader, built once for all layers (`with_chunks`), or None
    """

    owned: OwnedRows
    local: Segments
    prefixes: list[Prefix]
    places: Tensor
    lengths: Tensor
    chunks: CausalChunks | None = None

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
        if len(where) != group.size or pieces == 0 or sorted(chain(*where)) != list(range(group.size * pieces)):
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
        at = torch.tensor(where, device=device)
        mine = reader.cu_occurrences.diff()
        lengths = all_gather_rows(mine, [mine.numel()] * group.size, group, "causal.lengths").view(at.numel(), -1)
        lengths = torch.empty_like(lengths).index_copy(0, at.reshape(-1), lengths)
        before = _to_readers_of_pieces(owned, at, _counts_before(owned, at), "causal.counts")
        order, bounds = owned.together()
        prefixes = []
        for counts in before.index_select(0, order).unbind(1):
            seen = counts > 0
            ends = torch.zeros(seen.numel() + 1, dtype=torch.int32, device=device)
            torch.cumsum(seen, 0, out=ends[1:])
            prefixes.append(Prefix(order[seen], ends[bounds.long()], counts[seen]))
        return cls(owned, Segments.from_index(index, sum(rows)), prefixes, at, lengths)

    def with_chunks(self, size: int) -> CausalRows:
        """The same plan, its pieces cut into chunks of `size`. Local to the rank; sizes may differ between ranks."""
        return replace(self, chunks=CausalChunks.of(self.owned.reader, size))

    @property
    def tokens(self) -> Tensor:
        """(M,) int64: the token of each occurrence of this rank's pieces, packed in the reader's order."""
        reader = self.owned.reader
        return reader.tokens[reader.inverse]

    @property
    def starts(self) -> Tensor:
        """(N * P, B) int64: the position in its sample at which each piece begins, in the order of the sequence."""
        return self.lengths.cumsum(0) - self.lengths

    def positions(self) -> Tensor:
        """(M,) int64: the position in its sample of each occurrence of this rank's pieces."""
        reader, mine = self.owned.reader, self.places[self.owned.group.rank]
        return reader.positions() + self.starts[mine].reshape(-1)[reader.sample_of_occurrences()]


def causal_over_ranks(
    plan: CausalRows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    scale: float | None = None,
    chunk: int | CausalChunks | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each position of this rank's pieces onto all positions up to it, on whatever rank: out (M, H, Dv), lse (M, H).

    Equal to plain causal attention over the whole samples wherever equal tokens have equal keys and values.

    q:     (M, H, D), a query per occurrence of the reader, packed in its order (`plan.owned.reader.pack`)
    k, v:  (U_n, Hk, D), (U_n, Hk, Dv) of the owned rows, `plan.owned.space`
    decay: (H,) per head, ALiBi slopes or learned: a score loses decay times the number of positions from key to query
    chunk: of `causal_attention` within the piece; by default the plan's chunks, where it has them
    deterministic, backend: of both

    Collective over the group, forward and backward. Sent per rank: (N - 1) * U_n * (D + Dv) * Hk elements each way, and with
    decay (N - 1) * U_n * P * H more.
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
        decay=decay,
        scale=scale,
        chunk=plan.chunks if chunk is None else chunk,
        deterministic=deterministic,
        backend=backend,
        return_lse=True,
    )
    batch, wide = reader.num_samples // owned.pieces, torch.promote_types(q.dtype, torch.float32)
    decayed = None if decay is None else _decayed_before(plan, decay.to(wide))
    before = []
    for piece, prefix in enumerate(plan.prefixes):
        samples = slice(piece * batch, (piece + 1) * batch + 1)
        bounds, known = reader.cu_occurrences[samples], reader.host_bounds[0][samples]
        first, last = known[0], known[-1]
        weight = prefix.counts.to(wide).log() if decayed is None else decayed[:, piece].index_select(0, prefix.rows)
        before.append(
            weighted_attention(
                q[first:last],
                k.index_select(0, prefix.rows),
                v.index_select(0, prefix.rows),
                weight,
                (bounds - first).int(),
                prefix.cu_seqlens,
                scale=scale,
                return_lse=True,
                deterministic=deterministic,
                backend=backend,
            )
        )
    out, lse = (torch.cat(parts) for parts in zip(*before, strict=True))
    if decay is not None:  # from the start of the piece to the query
        lse = lse - reader.positions().to(wide)[:, None] * decay.to(wide)
    return merge(torch.stack([out, here[0]]), torch.stack([lse, here[1]]))


def _counts_before(owned: OwnedRows, places: Tensor) -> Tensor:
    """(N * P, U_n) int64: how often each owned row occurs before each place."""
    counts = owned.counts.new_zeros(places.numel(), owned.space.num_rows)
    counts.index_put_((_place_of_members(owned, places), owned.merged.inverse), owned.counts)  # each pair once
    return counts.cumsum(0) - counts


def _decayed_before(plan: CausalRows, decay: Tensor) -> Tensor:
    """(U, P, H): log of the sum of exp(-decay * (start of piece - position)) over what lies before each piece. Collective.

    Readers fold their pieces relative to the pieces' ends, owners carry the sum from place to place: every term stays near its own time.
    """
    owned, reader = plan.owned, plan.owned.reader
    length = reader.cu_occurrences.diff()[reader.sample_of_occurrences()]
    ages = (reader.positions() - length).to(decay.dtype)
    mine = segment_logsumexp(ages[:, None] * decay, reader.segments)
    members = owned.to_owners(mine, "causal.decayed")
    shape = (plan.places.numel(), owned.space.num_rows, decay.numel())
    pieces = members.new_full(shape, -torch.inf)
    pieces = pieces.index_put((_place_of_members(owned, plan.places), owned.merged.inverse), members)
    lengths = plan.lengths[:, owned.space.sample_of_rows()].to(decay.dtype)
    state, before = members.new_full(shape[1:], -torch.inf), []
    for piece, length in zip(pieces, lengths, strict=True):
        before.append(state)
        state = _add_logs(state - length[:, None] * decay, piece)
    return _to_readers_of_pieces(owned, plan.places, torch.stack(before), "causal.decayed_before")


def _place_of_members(owned: OwnedRows, places: Tensor) -> Tensor:
    """(received,) int64: the place of the piece that each member of `owned.merged` was read in."""
    of_samples = places.reshape(-1).repeat_interleave(owned.space.num_samples)  # of each (rank, piece, sample)
    sizes = owned.route.received_cu_seqlens.long().diff()
    return torch.repeat_interleave(of_samples, sizes, output_size=owned.counts.numel())[owned.by_sample]


def _to_readers_of_pieces(owned: OwnedRows, places: Tensor, of_places: Tensor, name: str) -> Tensor:
    """Per place and owned row (N * P, U_n, ...) to the ranks that read there: (U, P, ...), rows in rank order. Collective."""
    wanted = of_places[places].transpose(1, 2)  # (N, U_n, P, ...)
    rows = [owned.space.num_rows] * owned.group.size
    return all_to_all_rows(wanted.flatten(0, 1), rows, owned.rows_of_ranks, owned.group, name)


def _add_logs(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b), with gradient 0 instead of NaN where both are -inf."""
    peak = torch.maximum(a, b).detach()
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    total = (a - shift).exp() + (b - shift).exp()
    return (shift + total.masked_fill(total == 0, 1.0).log()).masked_fill(total == 0, -torch.inf)
