"""TokenizedAttention: the RFC's class. One batch goes from its reader through the owners of its tokens and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ta_plugin.attention.backends import choose
from ta_plugin.attention.dense import Activation, Normaliser
from ta_plugin.attention.layers import PackedTargets
from ta_plugin.attention.projections import HeadProjections
from ta_plugin.attention.scoring import Scoring
from ta_plugin.attention.sides import Sides
from ta_plugin.bounds import Bounds
from ta_plugin.checks import check_tokens
from ta_plugin.embedding import EmbeddingFn, check_owners, owned_id, owners_of, vocab_size_of
from ta_plugin.inputs import OPTIONAL, Inputs, check_agreement, check_gradient_flags, check_widths, gradient_flags
from ta_plugin.ops import expand
from ta_plugin.parallel import SSPGroup, all_gather_rows, exchange_header
from ta_plugin.strategies import (
    AttentionModules,
    Explanation,
    Layout,
    OwnedRows,
    Rates,
    Request,
    Workload,
    choose_strategy,
    explain,
    fetch,
    gather,
    id_shares,
    owner,
    ring,
)
from ta_plugin.strategies.request import Encoder, in_multiples
from ta_plugin.unique_space import UniqueSpace

_STRATEGIES = ("auto", "gather", "owner", "ring", "positions")
_LAYOUTS = ("sample", "sequence")


class TokenizedAttention(nn.Module):
    """Exact attention over the distinct tokens of each sample, whose embeddings are owned by the ranks of a group.

    With nothing else given, queries, keys and values are the embeddings themselves, one head, softmax at scale 1/sqrt(D).

    batch_size, sequence_length, nranks: B, L and N of the RFC; every batch has exactly B samples (pad a short one with length 0)
    embedding_fn: maps owned global ids (n,) int64 to rows (n, E), each id once; see `EmbeddingFn`. A module is registered here

    group:         SSPGroup or process group of nranks ranks. By default the default process group; without torch.distributed
                   nranks must be 1
    vocab_size:    ids must lie below it; None takes it from the embedding, and skips the check where that has none
    query, key, value: modules (n, E) -> (n, heads * head_dim); None takes the embedding. output: (n, H * Dv) -> (n, any)
    num_heads, num_kv_heads: H and Hk
    scale, score, normaliser, activation, backend, deterministic: see `Scoring`
    include_self:  a target also attends to its own key, with weight 1
    strategy:      "gather", "owner", "auto" (the cost model chooses per batch), or "positions": plain attention over every
                   occurrence, each fetching its own row, for comparison
    layout:        "sample": each rank reads samples of its own. "sequence": the ranks read chunks of the same samples, of any
                   lengths; sample b of every rank is one sample, whose positions count through the chunks in rank order.
                   sequence_length is then this rank's own L. Self-attention runs on owned rows (strategy "ring"), targets go
                   to the owners ("owner"), and each rank's targets see the whole sample
    rates:         what the cost model assumes of network and device
    row_multiple:  `encode` gets a multiple of so many rows, spare ones included, so that shapes repeat (torch.compile, CUDA graphs,
                   the caching allocator); exact for any value, and free to differ between ranks

    row_bound:     no batch of a rank has more distinct tokens than that, added up over its samples: sizes then never visit the host,
                   and a step can be captured in a CUDA graph (`CapturedStep`). For target attention in layout "sample"; on several
                   ranks in strategy "owner", which "auto" then is. What does not fit on one rank gives NaN on every rank, and
                   `check_bounds` raises
    id_bound:      no rank looks up more distinct ids than that, for the tokens of a batch or for its targets; row_bound by default
    route_bound:   no rank has more than that of its rows for one owner; by default a quarter above row_bound / nranks, and 64.
                   Every rank sends every owner so many, whatever a batch holds. Without effect on one rank

    Constructing is collective over the group: ranks that disagree on sizes, heads, strategy or nranks all raise here.
    """

    def __init__(
        self,
        batch_size: int,
        sequence_length: int,
        nranks: int,
        embedding_fn: EmbeddingFn,
        *,
        group: Any = None,
        vocab_size: int | None = None,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
        value: nn.Module | None = None,
        output: nn.Module | None = None,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        score: nn.Module | None = None,
        normaliser: Normaliser = "softmax",
        activation: Activation | None = None,
        include_self: bool = False,
        strategy: str = "auto",
        layout: Layout = "sample",
        backend: str | None = None,
        rates: Rates | None = None,
        row_multiple: int = 1,
        row_bound: int | None = None,
        id_bound: int | None = None,
        route_bound: int | None = None,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        if group is None and dist.is_initialized() and nranks > 1:
            group = dist.group.WORLD
        self.group = SSPGroup.wrap(group)
        self.batch_size, self.sequence_length = batch_size, sequence_length
        # an id beyond the table would fail, or alias another id, on its owner alone, while the others wait
        self.vocab_size = vocab_size if vocab_size is not None else vocab_size_of(embedding_fn)
        self.strategy, self.include_self, self.rates = strategy, include_self, rates
        self.layout: Layout = layout
        self.row_multiple = row_multiple
        self.embedding_fn = embedding_fn
        self.score = score  # registers its parameters
        self.output = output
        error: ValueError | None = None
        try:
            self._check_ranks(nranks)
            self._check_sizes(vocab_size)
            if row_multiple < 1:
                raise ValueError(f"row_multiple is {row_multiple}; pass 1 or more")
            if strategy not in _STRATEGIES:
                raise ValueError(f"strategy is {strategy!r}; choose one of {_STRATEGIES}")
            self._check_layout()
            self._given_bounds = row_bound, id_bound, route_bound
            self.bounds = self._bounds(*self._given_bounds)
            self.projections = HeadProjections(query, key, value, num_heads=num_heads, num_kv_heads=num_kv_heads)
            self.scoring = Scoring(
                scale=scale,
                score=score,
                normaliser=normaliser,
                activation=activation,
                backend=backend,
                deterministic=deterministic,
            )
        except ValueError as failure:  # the other ranks of the group must hear of it
            error = failure
        self._agree(error)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        *,
        targets: Tensor | None = None,
        queries: Tensor | None = None,
        target_lengths: Tensor | None = None,
        target_cutoffs: Tensor | None = None,
        bias: Tensor | None = None,
        value_term: Tensor | None = None,
        multiplier: Tensor | None = None,
        encode: Encoder | None = None,
    ) -> Tensor:
        """tokens (B, L) int64 and lengths (B,) int64 -> (B, L, H * Dv), rows past a length zero.

        targets:        (B, T) int64 ids: target attention onto the history instead, -> (B, T, H * Dv)
        queries:        (B, T, E) embeddings of the targets, where the caller has them already (`embed`)
        target_lengths: (B,) int64, how many targets a sample has; all T by default, rows past it are zero
        target_cutoffs: (B, T) int64: a target sees the occurrences at positions below its cutoff
        bias:           (B, L) or (B, L, H), added to the scores of an occurrence
        value_term:     (B, L, Hk, Dv) or (B, L, H, Dv), added to the value of an occurrence
        multiplier:     (B, L) or (B, L, H), with normaliser "none": applied after the activation
        encode:         called with the distinct rows (U, E) and their UniqueSpace between look-up and attention: layers that
                        run on distinct rows; the same on every rank. Gather only. In layout "sequence" it gets the rows this
                        rank owns and their OwnedRows, and attends by `strategies.row_attention`

        Collective over the group, forward and backward. What is wrong on one rank raises the same ValueError on every rank.
        """
        if encode is not None and self.row_multiple > 1:
            encode = in_multiples(encode, self.row_multiple)
        sides = (bias, value_term, multiplier)
        inputs = Inputs(tokens, lengths, targets, queries, target_lengths, target_cutoffs, *sides, encode)
        request, strategy = self._read(inputs)  # RFC steps 1 to 3
        if strategy == "ring":
            owned, mixed = ring(request, self._parts())
            return owned.to_positions(self._output(mixed))  # projected once per owned row
        attend = owner if strategy == "owner" else gather  # steps 4 and 5, and what follows them
        rows = self._output(attend(request, self._parts()))
        if self.bounds is not None:
            rows = rows.masked_fill(self.bounds.wrong(), torch.nan)
        return request.space.expand(rows) if request.targets is None else request.targets.unpack(rows)

    def _output(self, heads: Tensor) -> Tensor:
        rows = heads.flatten(1)
        return rows if self.output is None else self.output(rows)

    def embed(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings of ids (B, T) int64 from their owners: (B, T, E), zeros past `lengths` (B,). Collective."""
        error: Exception | None = None
        try:
            check_tokens("ids", ids, self.group.device, self.vocab_size, lengths)
        except Exception as failure:
            error = failure
        exchange_header(self.group, [], error)
        slots = PackedTargets(ids.shape[0], ids.shape[1], lengths, ids.device)
        parts = replace(self._parts(), bounds=None)
        table, segments = fetch(slots.pack(ids), parts, "embed", self.strategy != "positions")
        return slots.unpack(expand(table, segments))

    def explain(
        self, tokens: Tensor, lengths: Tensor, *, targets: Tensor | None = None, target_lengths: Tensor | None = None
    ) -> Explanation:
        """What a batch like this one costs under each strategy and over plain positions, and what would be chosen.

        Local in layout "sample"; collective in layout "sequence", where no rank knows how many distinct tokens a sample has.
        """
        space = UniqueSpace.from_padded(tokens, lengths, grouped=False)
        slots = None
        if targets is not None:
            slots = PackedTargets(targets.shape[0], targets.shape[1], target_lengths, targets.device)
        embed_dim = getattr(self.embedding_fn, "embedding_dim", None) or self._width_of_one_row()
        sizes = self._sizes(space, slots)
        sizes[3] = int(space.tokens.unique().numel())  # forward counts distinct ids only where its choice needs them
        load = self._workload([sizes], embed_dim, id_shares(space.tokens))
        if self.layout == "sequence":
            load = self._shared_workload(load, space)
        rates = self.rates or Rates.of(tokens.device)
        head_dim = load.head_dim
        choice = choose(
            self.scoring.backend,
            device=tokens.device,
            dtype=torch.get_default_dtype(),
            head_dim=head_dim,
            value_dim=head_dim,
            per_query_weights=False,
            causal=False,
        )
        only_gather = None if targets is not None else "self-attention has as many queries as keys"
        return explain(load, rates, self.strategy, f"{choice.name} ({choice.reason})", only_gather)

    def regroup(self, group: Any, layout: Layout | None = None) -> None:
        """Move to another SSPGroup or process group, and layout if given, sizes checked again. Collective over the group.

        The embedding is its own to move.
        """
        self.group = SSPGroup.wrap(group)
        self.layout = layout or self.layout
        error: ValueError | None = None
        try:
            check_owners(self.embedding_fn, self.group.size)
            self._check_layout()
            self.bounds = self._bounds(*self._given_bounds)
        except ValueError as failure:
            error = failure
        self._agree(error)

    def check_bounds(self) -> None:
        """Raise ValueError if a batch since the last check, of any rank, did not fit its bounds, or was wrong. Reads the device.

        Collective over the group.
        """
        if self.bounds is None:
            return
        error: ValueError | None = None
        try:
            self.bounds.check()
        except ValueError as failure:
            error = failure
        exchange_header(self.group, [], error)

    def extra_repr(self) -> str:
        sizes = f"batch_size={self.batch_size}, sequence_length={self.sequence_length}"
        return f"{sizes}, strategy={self.strategy!r}, layout={self.layout!r}, {self.group}"

    def _parts(self) -> AttentionModules:
        return AttentionModules(
            self.group,
            self.embedding_fn,
            self.projections,
            self.scoring,
            self.include_self,
            self.rates,
            self.bounds,
        )

    def _dense_parameters(self) -> Iterator[nn.Parameter]:
        for module in (self.projections, self.score, self.output):
            if module is not None:
                yield from module.parameters()

    def _check_ranks(self, nranks: int) -> None:
        if nranks != self.group.size:
            alone = self.group.group is None
            remedy = (
                "initialise torch.distributed first, or pass nranks=1"
                if alone
                else f"pass nranks={self.group.size} or a group"
            )
            raise ValueError(f"nranks is {nranks}, but the group has {self.group.size} rank(s); {remedy}")

    def _check_sizes(self, vocab_size: int | None) -> None:
        for name in ("batch_size", "sequence_length"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"{name} is {size!r}; pass an int, 0 or more")
        if not callable(self.embedding_fn):
            raise ValueError(
                f"embedding_fn is {self.embedding_fn!r}; pass what maps ids to rows, such as ShardedTokenEmbedding or nn.Embedding"
            )
        check_owners(self.embedding_fn, self.group.size)
        known = vocab_size_of(self.embedding_fn)
        if vocab_size is not None and known is not None and vocab_size > known:
            raise ValueError(
                f"vocab_size is {vocab_size}, but embedding_fn has {known} ids; leave it out, or pass {known} or less"
            )

    def _bounds(self, row_bound: int | None, id_bound: int | None, route_bound: int | None) -> Bounds | None:
        if row_bound is None:
            for name, bound in (("id_bound", id_bound), ("route_bound", route_bound)):
                if bound is not None:
                    raise ValueError(f"{name} is {bound} without row_bound; pass both, or row_bound alone")
            return None
        able = ("auto", "gather", "owner") if self.group.size == 1 else ("auto", "owner")
        if self.layout != "sample" or self.strategy not in able or self.include_self:
            raise ValueError(
                f"row_bound is {row_bound}, with {self.group.size} rank(s), layout {self.layout!r}, strategy {self.strategy!r}, "
                f"include_self={self.include_self}; it covers layout 'sample', 'auto' or 'owner', on one rank 'gather', "
                "without the own key"
            )
        return Bounds(row_bound, id_bound, self.vocab_size, route=route_bound, ranks=self.group.size)

    def _check_layout(self) -> None:
        if self.layout not in _LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; choose one of {_LAYOUTS}")
        able = ("auto", "gather", "owner", "positions") if self.layout == "sample" else ("auto", "ring", "owner")
        if self.strategy not in able:
            raise ValueError(f"strategy is {self.strategy!r} in layout {self.layout!r}; choose one of {able}")
        if self.layout == "sequence" and self.row_multiple > 1:
            raise ValueError(
                f"row_multiple is {self.row_multiple} in layout 'sequence', where owned rows take no spare ones; pass 1"
            )

    def _agree(self, error: ValueError | None = None) -> None:
        """Raise on every rank if any found an error, or if they were constructed differently."""
        uneven = self.layout == "sequence"  # chunks of any length
        mine: dict[str, int] = {}
        if error is None:
            mine = {
                "layout": _LAYOUTS.index(self.layout),
                "batch_size": self.batch_size,
                "sequence_length": 0 if uneven else self.sequence_length,
                "vocab_size": -1 if self.vocab_size is None else self.vocab_size,
                "num_heads": self.projections.num_heads,
                "num_kv_heads": self.projections.num_kv_heads,
                "include_self": int(self.include_self),
                "strategy": _STRATEGIES.index(self.strategy),
                "row_bound": 0 if self.bounds is None else self.bounds.rows,
                "id_bound": 0 if self.bounds is None else self.bounds.ids,
                "route_bound": 0 if self.bounds is None else self.bounds.route,
            }
        headers = exchange_header(self.group, list(mine.values()), error)
        for rank, header in enumerate(headers):
            for name, value, first in zip(mine, header, headers[0], strict=True):
                if value != first:
                    words = {"strategy": _STRATEGIES, "layout": _LAYOUTS}.get(name)
                    shown = [words[x] if words else x for x in (first, value)]
                    raise ValueError(
                        f"{name} is {shown[0]} on rank 0 but {shown[1]} on rank {rank}; pass the same on every rank"
                    )

    def _read(self, inputs: Inputs) -> tuple[Request, str]:
        """Check this rank's batch, build its unique space, and tell every rank its sizes, or what is wrong with it."""
        kinds, sizes, targets, sides = [0] * len(OPTIONAL), [0] * 5, None, Sides()
        space: UniqueSpace | None = None
        alone, flags = self.group.size == 1, 0
        if not alone:  # otherwise there is nobody to agree with
            flags = gradient_flags(self._dense_parameters(), getattr(self.embedding_fn, "table", self.embedding_fn))
        error: Exception | None = None
        try:
            inputs.check((self.batch_size, self.sequence_length), self.vocab_size, self._parts())
            targets = inputs.packed_targets()
            if targets is None and self.include_self:
                raise ValueError(
                    "include_self is set, but no targets are given; in self-attention a token sees itself anyway"
                )
            if self.bounds is not None:
                if self.bounds.spare_id is None:
                    self.bounds.spare_id = owned_id(self.embedding_fn, self.vocab_size, self.group)
                space = self.bounds.space(inputs.tokens, inputs.lengths, inputs.targets, inputs.reads_members())
            elif self.strategy == "positions":
                space = UniqueSpace.of_occurrences(inputs.tokens, inputs.lengths)
            else:
                space = UniqueSpace.from_padded(inputs.tokens, inputs.lengths, grouped=inputs.reads_members())
            sides = Sides.pack(space, inputs.bias, inputs.value_term, inputs.multiplier)
            sides.check(self.scoring.normaliser)
            kinds, sizes = kinds if alone else inputs.kinds(), self._sizes(space, targets)
        except Exception as failure:  # whatever it is, the other ranks must hear of it before they wait for a payload
            error = failure
        exchange = exchange_header if self.bounds is None else self.bounds.exchange_header
        headers = exchange(self.group, [flags, *kinds, *sizes], error)
        check_gradient_flags([header.pop(0) for header in headers])
        check_agreement([header[: len(OPTIONAL)] for header in headers])
        by_rank = [header[len(OPTIONAL) :] for header in headers]
        if self.bounds is not None:
            check_widths([s[4] for s in by_rank])
        assert space is not None
        request = Request(
            space,
            sides,
            batch_sizes=[self.batch_size] * self.group.size,
            query_counts=[s[2] for s in by_rank],
            shared=self.layout == "sequence",
            target_width=max(s[4] for s in by_rank),
            sequence_length=self.sequence_length,
            any_repeats=any(s[0] != s[1] for s in by_rank),
            targets=targets,
            target_ids=inputs.targets,
            queries=inputs.queries,
            cutoffs=inputs.target_cutoffs,
            encode=inputs.encode,
            deduplicate=self.strategy != "positions",
        )
        return request, self._choose(by_rank, targets is not None, inputs.encode is not None)

    def _sizes(self, space: UniqueSpace, slots: PackedTargets | None) -> list[int]:
        """What a rank announces: rows U, occurrences M, queries Q, distinct ids I, width T."""
        counted = self.strategy == "auto" and slots is not None and self.bounds is None
        ids = int(space.tokens.unique().numel()) if counted else space.num_rows
        if slots is None:
            return [space.num_rows, space.num_occurrences, space.num_rows, ids, 0]
        return [space.num_rows, space.num_occurrences, slots.num_targets, ids, slots.width]

    def _choose(self, by_rank: list[list[int]], has_targets: bool, encoded: bool) -> str:
        if self.bounds is not None and self.group.size > 1:
            return "owner"
        only_gather = None
        if not has_targets:
            only_gather = "self-attention has as many queries as keys"
        elif encoded and self.layout == "sample":
            only_gather = "encode makes keys depend on their sample"
        if self.layout == "sample" and self.strategy in ("gather", "owner", "positions") and only_gather is None:
            return self.strategy
        rates = self.rates or Rates.of(self.group.device)
        embed_dim = getattr(self.embedding_fn, "embedding_dim", None) or 64
        load = replace(self._workload(by_rank, embed_dim, 0.0), targets=has_targets)  # also with T = 0
        return choose_strategy(load, rates, self.strategy, only_gather)[0]

    def _workload(self, by_rank: list[list[int]], embed_dim: int, shares: float) -> Workload:
        n = len(by_rank)
        rows, occurrences, queries, ids = (sum(s[i] for s in by_rank) / n for i in range(4))
        heads = self.projections.num_heads
        width = getattr(self.projections.query, "out_features", embed_dim)
        targets = any(s[4] for s in by_rank)
        per_sample = max(self.batch_size, 1)
        return Workload(
            ranks=self.group.size,
            samples=self.batch_size,
            occurrences=occurrences,
            rows=rows,
            ids=ids,
            queries=queries,
            pairs=queries * rows / per_sample,
            position_pairs=(queries if targets else occurrences) * occurrences / per_sample,
            targets=targets,
            embed_dim=embed_dim,
            heads=heads,
            kv_heads=self.projections.num_kv_heads,
            head_dim=width // heads,
            id_shares=shares,
            layout=self.layout,
            projected_queries=self.projections.query is not None,
            projected_keys=self.projections.key is not None,
        )

    def _shared_workload(self, load: Workload, space: UniqueSpace) -> Workload:
        """Sizes over all ranks, from a routing of the batch. Collective."""
        group = self.group
        owned = OwnedRows.of(space, owners_of(self.embedding_fn, group.size), group)
        occurrences = all_gather_rows(space.cu_occurrences.diff(), [space.num_samples] * group.size, group, "lengths")
        lengths = occurrences.view(group.size, -1).double()
        rows = owned.everybody.diff(dim=1).double()
        n = group.size
        return replace(
            load,
            occurrences=float(lengths.sum()) / n,
            owned=float(rows.sum()) / n,
            ids=float(owned.space.tokens.unique().numel()),
            pairs=load.pairs if load.targets else float(rows.sum(0).square().sum()) / n,
            position_pairs=load.position_pairs if load.targets else float(lengths.sum(0).square().sum()) / n,
            id_shares=id_shares(owned.space.tokens) / n,
        )

    def _width_of_one_row(self) -> int:
        with torch.no_grad():
            return self.embedding_fn(torch.empty(0, dtype=torch.int64, device=self.group.device)).shape[1]
