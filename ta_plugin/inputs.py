"""What one call of TokenizedAttention is given, and what must hold of it on this rank and between ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ta_plugin.attention.layers import PackedTargets
from ta_plugin.checks import check_cutoffs, check_grid, check_lengths, check_queries, check_side, check_tokens
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.request import Encoder

OPTIONAL = ("targets", "queries", "target_lengths", "target_cutoffs", "bias", "value_term", "multiplier", "encode")


@dataclass(frozen=True)
class Inputs:
    """The arguments of `TokenizedAttention.forward`, by its names."""

    tokens: Tensor
    lengths: Tensor
    targets: Tensor | None = None
    queries: Tensor | None = None
    target_lengths: Tensor | None = None
    target_cutoffs: Tensor | None = None
    bias: Tensor | None = None
    value_term: Tensor | None = None
    multiplier: Tensor | None = None
    encode: Encoder | None = None

    def check(self, shape: tuple[int, int], vocab_size: int | None, modules: AttentionModules) -> None:
        """Raise ValueError for what is wrong with this rank's arguments; where sizes are bounded, without reading the device."""
        device, projections, bounded = modules.group.device, modules.projections, modules.bounds is not None
        if self.lengths is None:
            raise ValueError("lengths is None; pass (B,) int64, L for a sample without padding")
        check_tokens("tokens", self.tokens, device, vocab_size, self.lengths, shape, read=not bounded)
        if bounded:
            self._check_bounded()
        self._check_targets(device, vocab_size, read=not bounded)
        num_heads, num_kv_heads = projections.num_heads, projections.num_kv_heads
        check_side("bias", self.bias, self.tokens, {num_heads})
        check_side("multiplier", self.multiplier, self.tokens, {num_heads})
        check_side("value_term", self.value_term, self.tokens, {num_heads, num_kv_heads}, trailing=1)
        width = getattr(modules.embedding_fn, "embedding_dim", None)
        held = width if self.encode is None else None  # what an encoder makes of it, it knows alone
        asked = held if self.targets is None else width
        if self.queries is not None:
            asked = self.queries.shape[2]
        projections.check_widths(asked, held, self.queries is not None, modules.scoring.score is None)

    def packed_targets(self) -> PackedTargets | None:
        """The valid target slots, or None in self-attention."""
        grid = self.targets if self.targets is not None else self.queries
        if grid is None:
            return None
        return PackedTargets(grid.shape[0], grid.shape[1], self.target_lengths, grid.device)

    def reads_members(self) -> bool:
        """Whether which occurrences a row has is read: sides and cutoffs are folded, and self-attention expands, backward too."""
        if any(x is not None for x in (self.bias, self.value_term, self.multiplier, self.target_cutoffs)):
            return True
        return torch.is_grad_enabled() and self.targets is None and self.queries is None

    def kinds(self) -> list[int]:
        """For each optional argument a number that ranks must agree on: 0 for None, else of dtype, width and gradient."""
        return [_kind(getattr(self, name)) for name in OPTIONAL]

    def _check_bounded(self) -> None:
        if self.targets is None and self.queries is None:
            raise ValueError(
                "row_bound is given in self-attention; it covers target attention: pass targets or queries"
            )
        for name in ("target_lengths", "target_cutoffs", "value_term", "encode"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is given with row_bound, whose sizes never visit the host; leave out one of them"
                )

    def _check_targets(self, device: torch.device, vocab_size: int | None, read: bool) -> None:
        if self.targets is not None and self.queries is not None:
            raise ValueError("targets and queries are both given; pass ids or their embeddings, not both")
        grid = self.targets if self.targets is not None else self.queries
        if grid is None:
            for name in ("target_lengths", "target_cutoffs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given without targets; pass targets (B, T) or queries (B, T, E)")
            return
        if self.queries is not None:
            check_queries(self.queries, self.tokens)
        else:
            check_grid("targets", grid, device)
        check_lengths("target_lengths", self.target_lengths, grid.shape[0], grid.shape[1], self.tokens.device)
        if self.targets is not None:
            check_tokens("targets", self.targets, device, vocab_size, self.target_lengths, read=read)
        samples = self.tokens.shape[0]
        if grid.shape[0] != samples:
            raise ValueError(f"targets are for {grid.shape[0]} samples, tokens for {samples}; pass one row per sample")
        check_cutoffs(self.target_cutoffs, grid, self.tokens)


def gradient_flags(dense: Iterable[Tensor], embedding: Any) -> int:
    """A number that ranks must agree on: which dense parameters train, and whether the embedding does.

    Backward reaches the collectives that these flags lead to; where they differ, some ranks would wait for the others for ever.
    """
    if not torch.is_grad_enabled():
        return 0
    rows = (
        embedding.parameters() if isinstance(embedding, nn.Module) else ()
    )  # may differ in number: each rank has its own
    trains = getattr(embedding, "trainable", False) or any(p.requires_grad for p in rows)
    return 1 + zlib.crc32(repr([trains, *(p.requires_grad for p in dense)]).encode())


def check_gradient_flags(flags: list[int]) -> None:
    """Raise ValueError, on every rank alike, when the ranks' `gradient_flags` differ."""
    for rank, theirs in enumerate(flags):
        if theirs != flags[0]:
            raise ValueError(
                f"the parameters that train differ between rank 0 and rank {rank}: requires_grad, the embedding's trainable, or "
                "torch.no_grad(); freeze the same on every rank"
            )


def check_agreement(kinds: list[list[int]]) -> None:
    """Raise ValueError, on every rank alike, when the ranks' `Inputs.kinds` differ."""
    for rank, theirs in enumerate(kinds):
        for name, kind, first in zip(OPTIONAL, theirs, kinds[0], strict=True):
            if kind != first:
                raise ValueError(
                    f"{name} differs between rank 0 and rank {rank}: given on one only, or of another dtype, width or "
                    "requires_grad; pass the same on every rank"
                )


def check_widths(widths: list[int]) -> None:
    """Raise ValueError, on every rank alike, when the ranks' T differ where sizes are bounded."""
    for rank, width in enumerate(widths):
        if width != widths[0]:
            raise ValueError(
                f"samples have {widths[0]} targets on rank 0 but {width} on rank {rank}; with row_bound pass the same on every rank"
            )


def _kind(argument: Any) -> int:
    if not isinstance(argument, Tensor):
        return int(argument is not None)
    flows = argument.requires_grad and torch.is_grad_enabled()
    return 2 + zlib.crc32(repr((argument.dtype, tuple(argument.shape[2:]), flows)).encode())
