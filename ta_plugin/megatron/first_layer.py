"""Causal attention of the first layer in unique space, for stock models that give their layers no tokens.

Below the first layer nothing has mixed positions yet, so without positional embeddings equal tokens have equal keys and values. They
are found by content: a layer that sees hidden states only needs no plan, and computes plain causal attention whatever it is given.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ta_plugin.attention import causal_attention
from ta_plugin.megatron.refusals import check_core, check_dropout
from ta_plugin.unique_space import UniqueSpace


class RepeatedKeyAttention(MegatronModule):
    """Causal self-attention that holds each distinct (key, value) of a sample once.

    Bit-equal keys and values count as one token's, and their gradient goes to its first occurrence: the sum over a token's
    occurrences, and so every parameter's gradient, is that of plain attention, unless two ids have bit-equal embeddings.

    Constructed by Megatron's SelfAttention, with keywords. Raises ValueError for what is not plain causal attention.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        check_core(config, attention_type)
        check_dropout(config, "attention_dropout")
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"attn_mask_type is {attn_mask_type.name}; this layer is causal, use AttnMaskType.causal")
        if config.context_parallel_size > 1:
            raise ValueError(
                f"context_parallel_size is {config.context_parallel_size}; each rank holds a part of the positions. Set it to 1"
            )
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """query (L, B, H, D), key and value (L, B, Hk, D) of this rank's heads -> (L, B, H * D)."""
        length, batch = query.shape[:2]
        if packed_seq_params is not None or attention_bias is not None or key.shape[0] != length:
            raise ValueError(
                "the first layer was given packed_seq_params, attention_bias or a key-value cache; it trains on whole padded samples"
            )
        if attention_mask is not None:
            _check_causal(attention_mask, length)
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
        space, first = distinct_rows(k, v, batch)
        out = causal_attention(space, q, k.index_select(0, first), v.index_select(0, first), scale=self.scale)
        return out.flatten(1).view(batch, length, -1).transpose(0, 1).contiguous()


class FirstLayerAttention:
    """A core_attention class: constructing one gives `RepeatedKeyAttention` for the first layer, `stock` for the others."""

    stock: ClassVar[type]

    def __new__(cls, *, layer_number: int, **options: Any) -> Any:
        return (RepeatedKeyAttention if layer_number == 1 else cls.stock)(layer_number=layer_number, **options)


@torch.no_grad()
def distinct_rows(k: Tensor, v: Tensor, batch: int) -> tuple[UniqueSpace, Tensor]:
    """Which of the keys and values (B * L, Hk, D), sample by sample, are bit-equal: their space, and the first occurrence of each row.

    Rows are compared by a 64-bit hash, and then in full; should two different ones share it, all rows count as distinct.
    """
    words = torch.cat((k.flatten(1), v.flatten(1)), 1)
    pad = -words.shape[1] * words.element_size() % 8 // words.element_size()
    words = torch.nn.functional.pad(words, (0, pad)).contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(words.shape[1])
    odd = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator).mul_(2).add_(1).to(words.device)
    ids = ((words ^ (words >> 29)) * odd).sum(1)
    ids = (ids ^ (ids >> 32)) & (2**62 - 1)
    lengths = torch.full((batch,), words.shape[0] // batch, dtype=torch.int64, device=words.device)
    space = UniqueSpace.from_padded(ids.view(batch, -1), lengths)
    first = _first_occurrences(space)
    if not torch.equal(words, words[first[space.inverse]]):
        ids = torch.arange(words.shape[0], device=words.device)
        space = UniqueSpace.from_padded(ids.view(batch, -1), lengths)
        first = _first_occurrences(space)
    return space, first


def _first_occurrences(space: UniqueSpace) -> Tensor:
    place = torch.arange(space.num_occurrences, device=space.tokens.device)
    start = place.new_full((space.num_rows,), space.num_occurrences)
    return start.scatter_reduce_(0, space.inverse, place, "amin")


def _check_causal(mask: Tensor, length: int) -> None:
    ahead = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.shape[-2:] != ahead.shape or not bool((mask == ahead).all()):
        raise ValueError(
            "attention_mask is not the causal mask; documents that may not see each other need stock layers. Leave out "
            "--reset-attention-mask, or pass --no-create-attention-mask-in-dataloader"
        )
