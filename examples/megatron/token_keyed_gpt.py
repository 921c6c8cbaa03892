"""Megatron's GPTModel with token-keyed layers, called as the examples call their models: tokens, lengths, labels -> losses."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from ta_plugin.megatron import get_token_keyed_block_spec, plan_causal
from ta_plugin.megatron.layer_specs import has_transformer_engine
from ta_plugin.megatron.layers import rotary_angles


class HostRotary(RotaryEmbedding):
    """Megatron's rotary angles without CUDA, which its own class asks for a device."""

    def __init__(self, dim: int, base: float, groups: ProcessGroupCollection) -> None:
        super().__init__(dim, 1.0, rotary_base=int(base), use_cpu_initialization=True, cp_group=groups.cp)
        self.dim, self.base = dim, base

    def forward(self, max_seq_len: int, offset: int = 0, **_: Any) -> Tensor:
        """(positions, 1, 1, dim) float32, of this context-parallel rank's among the max_seq_len from `offset` on."""
        return dealt(
            rotary_angles(max_seq_len + offset, self.dim, self.base, torch.device("cpu"))[offset:], self.cp_group, 0
        )


class TokenKeyedGPT(GPTModel):
    """A causal GPT that plans each microbatch itself. window: positions that a rotary layer sees, all by default."""

    window: int | None = None

    def forward(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """tokens (B, L), lengths (B,), labels (B, L), negative for nothing, all int64 -> losses (B, L) float32, 0 where unlabelled.

        Under context parallelism of N every rank is given whole samples, and returns the losses (B, L / N) of its positions.
        """
        context, everywhere = self.pg_collection.cp, torch.arange(tokens.shape[1], device=tokens.device)
        place = dealt(everywhere, context, 0)
        age = place[:, None] - everywhere
        hidden = (age < 0) | (age >= (self.window or tokens.shape[1]))  # True where a query must not look
        tokens, labels = dealt(tokens, context, 1), dealt(labels, context, 1)
        losses = super().forward(
            tokens,
            place.expand(tokens.shape[0], -1),
            hidden[None, None],
            labels=labels.clamp(min=0),
            packed_seq_params=plan_causal(tokens, self.config, lengths=lengths),
        )
        return losses.masked_fill((labels < 0) | (place >= lengths[:, None]), 0.0)


def dealt(whole: Tensor, context: ProcessGroup, dim: int) -> Tensor:
    """What this context-parallel rank of N holds of `whole`: pieces r and 2 N - 1 - r of 2 N equal ones along `dim`."""
    rank, size = context.rank(), context.size()
    if size == 1:
        return whole
    pieces = whole.chunk(2 * size, dim)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]], dim)


def build_token_keyed(
    args: Namespace,
    config_of: Callable[..., TransformerConfig],
    groups: ProcessGroupCollection,
    vocab_size: int,
    *,
    rotary_base: float | None,
    **stage: Any,
) -> TokenKeyedGPT:
    """Every `args.ta_token_keyed_every`-th layer token-keyed and global, others stock. Raises ValueError for what they do not cover."""
    # Transformer Engine masks by the config, and under context parallelism in ways of its own, which are not tried; SDPA by forward's mask
    window, engine = args.ta_window, has_transformer_engine() and args.context_parallel_size == 1
    config = config_of(**({"window_size": (window - 1, 0)} if window is not None and engine else {}))
    _refuse(args, config, vocab_size)
    model = TokenKeyedGPT(
        config,
        get_token_keyed_block_spec(
            config, vocab_size, every=args.ta_token_keyed_every, use_transformer_engine=engine, use_sdpa=not engine
        ),
        vocab_size,
        args.seq_length,
        position_embedding_type="rope" if rotary_base else "none",
        rotary_base=int(rotary_base or 10000),
        share_embeddings_and_output_weights=False,
        pg_collection=groups,
        **stage,
    )
    model.window = window
    if rotary_base and not torch.cuda.is_available():
        model.rotary_pos_emb = HostRotary(config.kv_channels, rotary_base, groups)
    return model


def _refuse(args: Namespace, config: TransformerConfig, vocab_size: int) -> None:
    every, layers = args.ta_token_keyed_every, config.num_layers
    if not 1 <= every <= layers:
        raise ValueError(
            f"--ta-token-keyed-every is {every}; pass 1 (all layers) to {layers}, the number of layers (--num-layers)"
        )
    if args.ta_objective != "next":
        raise ValueError(
            f"--ta-token-keyed-every is {every} with --ta-objective {args.ta_objective}; token-keyed layers are causal. Use --ta-objective "
            "next, or leave --ta-token-keyed-every out"
        )
    if args.ta_tokenized_layers:
        raise ValueError(
            f"--ta-tokenized-layers is {args.ta_tokenized_layers} with --ta-token-keyed-every {every}; tokenized layers are bidirectional. "
            "Set it to 0"
        )
    for flag, size, reason in (
        (
            "--ta-ssp-size",
            args.ta_ssp_size,
            "the tables of token-keyed layers are sharded over tensor parallelism only",
        ),
        ("--pipeline-model-parallel-size", config.pipeline_model_parallel_size, "this script plans for one stage"),
    ):
        if size > 1:
            raise ValueError(
                f"{flag} is {size} with --ta-token-keyed-every {every}; {reason}. Set it to 1 and spread over "
                "--tensor-model-parallel-size, --context-parallel-size and data parallelism"
            )
    pieces = 2 * config.context_parallel_size
    if config.context_parallel_size > 1 and args.seq_length % pieces:
        raise ValueError(
            f"--seq-length is {args.seq_length} with --context-parallel-size {config.context_parallel_size}, which deals it in {pieces} "
            f"equal pieces; pass a multiple of {pieces}"
        )
    if args.ta_window is not None and args.ta_window < 1:
        raise ValueError(f"--ta-window is {args.ta_window}; pass 1 (a position itself) or more, or leave it out")
    if vocab_size % config.tensor_model_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size is {config.tensor_model_parallel_size}, which does not divide the {vocab_size} ids; choose "
            "one that does"
        )
