"""Tokenized attention under Ulysses: its local attention sees whole sequences, and runs on their distinct tokens."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from ta_plugin.attention import Scoring, causal_attention, self_attention
from ta_plugin.checks import check_grid, check_lengths
from ta_plugin.deepspeed.plan import TokenPlan
from ta_plugin.parallel import SSPGroup, exchange_header


class TokenizedUlyssesAttention(nn.Module):
    """Self-attention of sequences whose chunks lie on the ranks of Ulysses' group, equal chunks in rank order.

    Bidirectional: exact where q, k and v depend on the token only (no positions below). causal: exact where k and v do; q may be
    of the position, as in token-keyed layers. `verify` checks on the first call what must hold. Without a group it is the same on one rank;
    the "sequence" layout of the block gives it Ulysses' group and the block's options.
    """

    def __init__(self, scale: float | None = None, *, causal: bool = False, verify: bool = True) -> None:
        super().__init__()
        self.scale, self.causal, self.verify = scale, causal, verify
        self.set_group(SSPGroup(None), Scoring())

    def set_group(self, group: SSPGroup, scoring: Scoring, row_multiple: int = 1) -> None:
        """Attend over sequences that lie on `group`. Causal attention has no use for row_multiple."""
        row_multiple = 1 if self.causal else row_multiple
        self._group = group
        self._plan = TokenPlan("tokens", "lengths", group, verify=self.verify, row_multiple=row_multiple)
        self._scoring = replace(scoring, scale=self.scale)
        local = (_LocalCausalAttention if self.causal else _LocalAttention)(self._plan, self._scoring)
        self._attend = local if group.group is None else DistributedAttention(local, group.group, 2, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """q, k, v (B, L / N, H, D) and tokens (B, L / N) of this rank's chunk -> (B, L / N, H, D). Collective over the group.

        lengths: (B,) int64 of the whole sequences, L by default; rows past them are 0. H must be a multiple of N. What is wrong on one
        rank, chunks of other sizes and other lengths raise ValueError on every rank.
        """
        self._agree((q, k, v), tokens, lengths)
        self._plan.build(self._whole(tokens), lengths)
        if self._group.group is None:
            return self._attend(q, k, v)
        return self._attend(q, k, v, 0)

    def _agree(self, grids: tuple[Tensor, ...], tokens: Tensor, lengths: Tensor | None) -> None:
        """What a rank finds wrong raises on all, before anything that depends on the shapes of all is exchanged."""
        error, fields = None, [0, 0, 0]
        try:
            check_grid("tokens", tokens, grids[0].device)
            batch, width = tokens.shape
            for name, x in zip("qkv", grids, strict=True):
                if x.dim() != 4 or x.shape[:2] != tokens.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(x.shape)}; pass ({batch}, {width}, heads, head_dim), as tokens has"
                    )
            check_lengths("lengths", lengths, batch, width * self._group.size, tokens.device)
            fields = [batch, width, 0 if lengths is None else zlib.crc32(str(lengths.tolist()).encode())]
        except ValueError as failure:
            error = failure
        first, *others = exchange_header(self._group, fields, error)
        for rank, other in enumerate(others, 1):
            if other[:2] != first[:2]:
                raise ValueError(
                    f"tokens has shape {tuple(first[:2])} on rank 0 but {tuple(other[:2])} on rank {rank}; give every rank an equal chunk "
                    "of the same sequences"
                )
            if other != first:
                raise ValueError(f"lengths differ between rank 0 and rank {rank}; pass those of the whole sequences")

    def _whole(self, tokens: Tensor) -> Tensor:
        """The ids of the whole sequences (B, L) from every rank's chunk."""
        if self._group.group is None:
            return tokens
        chunks = [torch.empty_like(tokens) for _ in range(self._group.size)]
        dist.all_gather(chunks, tokens.contiguous(), group=self._group.group)
        return torch.cat(chunks, 1)


class _LocalAttention(nn.Module):
    """Whole sequences, this rank's heads: q, k, v (B, L, H / N, D) -> (B, L, H / N, D)."""

    def __init__(self, plan: TokenPlan, scoring: Scoring) -> None:
        super().__init__()
        self._plan, self._scoring = plan, scoring

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._plan.check_once(self, "TokenizedUlyssesAttention", q, k, v)
        assert self._plan.space is not None
        rows = [self._plan.rows_of(x) for x in (q, k, v)]
        return self._plan.space.expand(self_attention(self._plan.space, *rows, scoring=self._scoring))


class _LocalCausalAttention(_LocalAttention):
    """The same, every position onto those up to it: queries per position, keys and values per distinct token."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._plan.check_once(self, "TokenizedUlyssesAttention(causal=True)", k, v)
        space, scoring = self._plan.space, self._scoring
        assert space is not None
        keys, values = (self._plan.rows_of(x) for x in (k, v))
        out = causal_attention(
            space,
            space.pack(q),
            keys,
            values,
            scale=scoring.scale,
            deterministic=scoring.deterministic,
            backend=scoring.backend,
        )
        return space.unpack(out)
