"""The core_attention and self_attention slots of a tokenized TransformerLayer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ta_plugin.attention import Scoring
from ta_plugin.attention.layers import cross_attention
from ta_plugin.megatron.plan import layout_of
from ta_plugin.megatron.refusals import check_layer
from ta_plugin.parallel import SSPGroup, all_gather_rows
from ta_plugin.strategies import ring_attention


class TokenizedCoreAttention(MegatronModule):
    """Bidirectional attention of each sample's distinct rows onto each other, each key weighted by its multiplicity.

    Under context parallelism every rank holds a part of the rows; keys and values are gathered over the group. In layout "sequence"
    a rank's part are the rows it owns, and keys and values circulate (`strategies.ring_attention`).

    Constructed by Megatron's SelfAttention, with keywords. Raises ValueError for what would not be exact (`refusals`).
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str | None = None,
        deterministic: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        check_layer(config, attn_mask_type, attention_type)
        self.layer_number = layer_number
        self.scoring = Scoring(scale=softmax_scale, backend=backend)
        self.set_deterministic(deterministic)
        self.context = _context_of(pg_collection)

    def set_deterministic(self, deterministic: bool) -> None:
        """Whether backward repeats bit for bit; Megatron's deterministic_mode has it do so in any case."""
        self.scoring = replace(self.scoring, deterministic=deterministic or self.config.deterministic_mode)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Rows query (local, H, D), key and value (local, Hk, D) of this rank's heads -> (local, H * D)."""
        layout = layout_of(packed_seq_params)
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is given to a tokenized layer; pass None, lengths exclude the padding already"
            )
        if attention_bias is not None:
            raise ValueError(
                "attention_bias is given to a tokenized layer; biases between positions do not fold, pass None"
            )
        if layout.owned is not None:
            q, k, v = (x[: layout.rows] for x in (query, key, value))
            out, _lse = ring_attention(layout.owned, q, k, v, scoring=self.scoring)
            return layout.pad(out.flatten(1))
        space, size = layout.space, self.context.size
        keys = all_gather_rows(key, [layout.local] * size, self.context, "keys")[: space.num_rows]
        values = all_gather_rows(value, [layout.local] * size, self.context, "values")[: space.num_rows]
        out, _lse = cross_attention(
            space, query[: layout.rows], layout.query_bounds(), keys, values, scoring=self.scoring
        )
        return layout.pad(out.flatten(1))


class SDPACoreAttention(MegatronModule):
    """Attention over positions by torch's scaled_dot_product_attention: Megatron's local DotProductAttention without CUDA.

    Under context parallelism, which that one lacks, each rank holds the positions that Megatron deals it, zigzag, and gathers the keys
    and values of all.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.window_size is not None or getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError("window_size or softmax_type is set; leave both out, or use use_sdpa=False on a GPU")
        self.scale, self.context = softmax_scale, _context_of(pg_collection)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, /, **_: Any) -> Tensor:
        """query (L, B, H, D), key and value (L, B, Hk, D) of this rank's positions -> (L, B, H * D).

        attention_mask: broadcast to (B, 1, L, positions of all ranks), True where hidden. Raises ValueError for another number of columns
        """
        key, value = self._whole(key, "keys"), self._whole(value, "values")
        if attention_mask is None or attention_mask.shape[-1] != key.shape[0]:
            given = "None" if attention_mask is None else f"of shape {tuple(attention_mask.shape)}"
            raise ValueError(
                f"attention_mask is {given}; pass a column for each of the {key.shape[0]} positions of the "
                f"{self.context.size} context-parallel rank(s)"
            )
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=~attention_mask, dropout_p=dropout, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _whole(self, rows: Tensor, name: str) -> Tensor:
        """Of N ranks' (L / N, ...), pieces r and 2 N - 1 - r of 2 N, all in order: (L, ...)."""
        size = self.context.size
        if size == 1:
            return rows
        pieces = all_gather_rows(rows, [rows.shape[0]] * size, self.context, name).unflatten(0, (size, 2, -1))
        return torch.cat([pieces[:, 0], pieces[:, 1].flip(0)]).flatten(0, 1)


class TokenizedSelfAttention(SelfAttention):
    """Megatron's SelfAttention that refuses rotary positions instead of applying them to rows."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As SelfAttention. Raises ValueError when rotary embeddings reach this layer."""
        free = self.config.no_rope_freq
        rotated = any(
            kwargs.get(name) is not None for name in ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_cos_sin")
        )
        if rotated and not (free and free[self.layer_number - 1]):
            raise ValueError(
                f"rotary_pos_emb reached tokenized layer {self.layer_number}; with positions equal tokens have different keys. Use "
                "position_embedding_type='none', or in a mixed stack set no_rope_freq to 1 for the tokenized layers"
            )
        return super().forward(hidden_states, *args, **kwargs)


def _context_of(pg_collection: ProcessGroupCollection | None) -> SSPGroup:
    context = getattr(pg_collection, "cp", None)
    return SSPGroup(context if context is not None and context.size() > 1 else None)
