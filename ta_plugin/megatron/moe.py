"""Mixture-of-experts routing whose balancing counts occurrences, not distinct rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

_TINY = 1e-12  # keeps 0 / 0 out of a microbatch without occurrences


class MultiplicityRouter(TopKRouter):
    """TopKRouter over distinct rows: auxiliary losses and expert loads as over positions.

    Routing itself needs no weights, since a row's occurrences all choose the experts of the row.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts: Tensor | None = None
        selective = self.config.recompute_granularity == "selective" and "moe" in self.config.recompute_modules
        if selective and (self.is_aux_loss_enabled() or self.enable_expert_bias):
            raise ValueError(
                "recompute_modules contains 'moe', which routes again outside its layer, where multiplicities are not known; "
                "recompute 'core_attn' or 'layernorm' instead, or use recompute_granularity='full'"
            )

    @contextmanager
    def weighted(self, counts: Tensor) -> Iterator[None]:
        """Multiplicities (rows,) int64, 0 for padding rows, of the rows routed inside the block."""
        self._counts = counts
        try:
            yield
        finally:
            self._counts = None

    def gating(self, input: Tensor) -> Tensor:
        """Router logits (rows, 1, experts). 0.16.1's own needs Transformer Engine's name to exist; without it, a plain product."""
        if hasattr(moe_utils, "te_general_gemm"):
            return super().gating(input)
        wide = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype or "", input.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(input.to(wide), self.weight.to(wide), bias)

    def _apply_aux_loss(self, probs: Tensor, scores: Tensor, routing_map: Tensor, *_: Any, **__: Any) -> Tensor:
        # with_padding_mask makes Megatron take the number of tokens from the map's sum: here the number of occurrences
        counts = self._column(scores)
        return super()._apply_aux_loss(probs, scores * counts, routing_map * counts + _TINY, with_padding_mask=True)

    def _apply_global_aux_loss(self, probs: Tensor, scores: Tensor, routing_map: Tensor, *_: Any, **__: Any) -> Tensor:
        counts = self._column(scores)
        return super()._apply_global_aux_loss(
            probs, scores * counts, routing_map * counts + _TINY, with_padding_mask=True
        )

    def _apply_expert_bias(self, routing_map: Tensor, *_: Any, **__: Any) -> None:
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += (routing_map * self._column(self.local_tokens_per_expert)).sum(0)

    def _column(self, like: Tensor) -> Tensor:
        assert self._counts is not None, "the router ran outside its layer"
        return self._counts.to(like.dtype)[:, None]
