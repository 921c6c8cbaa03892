"""TransformerLayers of a tokenized stack: those that run on distinct rows, and stock ones above them that run on positions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ta_plugin.megatron.moe import MultiplicityRouter
from ta_plugin.megatron.plan import RowLayout, layout_of


class TokenizedTransformerLayer(TransformerLayer):
    """A stock layer on distinct rows; hands a MoE router the multiplicities of the rows it is about to route."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states (rows, 1, hidden) with packed_seq_params=TokenizedSeqParams."""
        router = getattr(self.mlp, "router", None)
        weighted = (
            router.weighted(self._counts(layout_of(kwargs.get("packed_seq_params"))))
            if isinstance(router, MultiplicityRouter)
            else nullcontext()
        )
        with weighted:  # here, not in the model: recomputation runs whole layers again
            return super().forward(*args, **kwargs)

    def _counts(self, layout: RowLayout) -> Tensor:
        counts = layout.counts()
        if not self.config.sequence_parallel:
            return counts
        return counts.chunk(self.tp_group.size())[self.tp_group.rank()]


class PositionTransformerLayer(TransformerLayer):
    """A stock layer over positions, above tokenized ones. The first of them expands the rows.

    expands: hidden states come as distinct rows and leave as positions
    causal:  its attention is causal
    """

    def __init__(self, *args: Any, expands: bool = False, causal: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expands, self.causal = expands, causal
        if self.config.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size is {self.config.context_parallel_size} with stock layers above tokenized ones; rows are not "
                "spread over context-parallel ranks as positions are. Set it to 1, or tokenize every layer"
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (L, B, hidden), or rows where this layer expands them -> (L, B, hidden)."""
        layout = layout_of(packed_seq_params)
        if self.expands:
            hidden_states = rows_to_positions(
                hidden_states, layout, self.tp_group if self.config.sequence_parallel else None
            )
        mask = position_mask(layout, self.causal) if attention_mask is None else attention_mask
        return super().forward(hidden_states, mask, *args, packed_seq_params=None, **kwargs)


def rows_to_positions(rows: Tensor, layout: RowLayout, sequence_parallel_group: Any | None = None) -> Tensor:
    """Rows (local, 1, hidden) to positions (L, B, hidden), zeros past the lengths; scattered over TP where a group is given."""
    if sequence_parallel_group is not None:
        # every rank expands all rows, so each has the whole gradient of them: no sum in backward
        rows = gather_from_sequence_parallel_region(
            rows, tensor_parallel_output_grad=False, group=sequence_parallel_group
        )
    positions = layout.space.expand(rows[: layout.space.num_rows, 0]).transpose(0, 1).contiguous()
    if sequence_parallel_group is None:
        return positions
    if positions.shape[0] % sequence_parallel_group.size():
        raise ValueError(
            f"tokens have length {positions.shape[0]}, which {sequence_parallel_group.size()} sequence-parallel ranks cannot "
            "share; pad it to a multiple"
        )
    return scatter_to_sequence_parallel_region(positions, group=sequence_parallel_group)


def position_mask(layout: RowLayout, causal: bool) -> Tensor:
    """(B, 1, L, L) bool, True where a query must not look: past the length, and ahead of it where causal."""
    space = layout.space
    length = space.padded_length or 0
    place = torch.arange(length, device=space.tokens.device)
    hidden = (place >= space.cu_occurrences.diff()[:, None])[:, None, None, :].expand(-1, 1, length, -1)
    return hidden | (place > place[:, None]) if causal else hidden


def rotary_angles(length: int, dim: int, base: float, device: torch.device) -> Tensor:
    """(length, 1, 1, dim) float32 angles, as Megatron's RotaryEmbedding gives them to layers (halves rotated together)."""
    frequencies = base ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles, angles), -1)[:, None, None, :]
