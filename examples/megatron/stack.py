"""The stack of pretrain_gpt.py, and its masked batches; the same on megatron.training and on megatron.core alone."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from core_loop import mask_tokens
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from token_keyed_gpt import TokenKeyedGPT, build_token_keyed
from torch import Tensor

from ta_plugin.megatron import TokenizedModel, get_mixed_block_spec
from ta_plugin.megatron.arguments import model_options


def build_model(
    args: Namespace,
    config_of: Callable[..., TransformerConfig],
    groups: ProcessGroupCollection,
    token_ids: int,
    *,
    rotary_base: float | None,
    vp_stage: int | None = None,
    **stage: Any,
) -> TokenizedModel | TokenKeyedGPT:
    """The first layers tokenized, the others stock: causal for the objective "next", where all are stock, or some token-keyed.

    config_of: makes the config of `args` with changes; token_ids: how many ids the data has
    """
    if args.ta_token_keyed_every is not None:
        ids = vocabulary(args, token_ids)
        return build_token_keyed(args, config_of, groups, ids, rotary_base=rotary_base, vp_stage=vp_stage, **stage)
    if args.ta_window is not None:
        raise ValueError(f"--ta-window is {args.ta_window} without --ta-token-keyed-every; give both, or leave it out")
    masked = args.ta_objective == "masked"
    tokenized = args.ta_tokenized_layers
    if tokenized is None:
        tokenized = args.num_layers // 2 if masked else 0
    if tokenized and not masked:
        raise ValueError(
            f"ta_tokenized_layers is {tokenized} with --ta-objective next; tokenized layers are bidirectional and would show each position "
            "the token it shall predict. Set it to 0, or use --ta-objective masked"
        )
    free = [1] * tokenized + [0] * (args.num_layers - tokenized)
    config = config_of(no_rope_freq=free if rotary_base else None)
    spec = get_mixed_block_spec(
        config,
        tokenized,
        causal=not masked,
        use_sdpa=not torch.cuda.is_available(),
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank(),
    )
    return TokenizedModel(
        config,
        vocabulary(args, token_ids),
        spec,
        pg_collection=groups,
        embedding_seed=args.seed,
        rotary_base=rotary_base,
        vp_stage=vp_stage,
        **stage,
        **model_options(args),
    )


def vocabulary(args: Namespace, token_ids: int) -> int:
    """Ids of the model: those of the data, and for "masked" more, of which the last is the mask; a multiple of what TP divides."""
    if args.ta_objective == "next":
        return token_ids
    multiple = args.ta_vocab_divisible_by * args.tensor_model_parallel_size
    return (token_ids // multiple + 1) * multiple


def masked_batch(tokens: Tensor, seed: int, mask: int) -> tuple[Tensor, Tensor]:
    """Tokens with hidden ones, and labels; drawn from the batch itself, so that every rank that reads it hides the same."""
    return mask_tokens(tokens, mask, torch.Generator().manual_seed(seed + int(tokens.sum())))
