"""pretrain_gpt.py through megatron.training: its arguments, data sets, schedules, optimizer, logging and checkpoints.

Written for two generations: up to 0.18 pretrain() parses the arguments itself, from 0.19 on it is given them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import arguments as megatron_arguments
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split
from stack import build_model, masked_batch, vocabulary
from torch import Tensor

from ta_plugin.megatron import loss_function
from ta_plugin.megatron.arguments import add_ta_arguments
from ta_plugin.megatron.training import helpers_as_shipped, initialize_groups, ssp_collection

DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer", "position_embedding_type": "rope"}


def main() -> None:
    data_sets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads: every stage plans from the tokens
    options: dict[str, Any] = {"model_type": ModelType.encoder_or_decoder, "forward_step_func": forward_step}
    if hasattr(megatron_arguments, "parse_and_validate_args"):
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        args = megatron_arguments.parse_and_validate_args(add_ta_arguments, args_defaults=DEFAULTS)
        initialize_groups(args)
        with helpers_as_shipped():
            pretrain(pretrain_cfg_container_from_args(args), data_sets, model_provider=model_provider, **options)
    else:
        args = megatron_arguments.parse_args(add_ta_arguments)
        megatron_arguments.validate_args(args, DEFAULTS)
        initialize_groups(args)
        pretrain(data_sets, model_provider, extra_args_provider=add_ta_arguments, args_defaults=DEFAULTS, **options)


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **_: Any
) -> torch.nn.Module:
    args = get_args()
    if args.position_embedding_type not in ("rope", "none"):
        raise ValueError(f"position_embedding_type is {args.position_embedding_type!r}; choose 'rope' or 'none'")
    if args.num_experts is None and args.pipeline_model_parallel_size > 1:
        args.moe_token_dispatcher_type = "alltoall"  # what Megatron wants beside variable lengths, experts or not
    args.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    return build_model(
        args,
        lambda **changes: core_transformer_config_from_args(Namespace(**(vars(args) | changes))),
        ssp_collection(),
        args.padded_vocab_size,
        rotary_base=args.rotary_base if args.position_embedding_type == "rope" else None,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
    )


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    args = get_args()
    batch = next(batches)
    device = torch.cuda.current_device()
    tokens = batch["tokens"]
    if args.ta_objective == "masked":
        tokens, labels = masked_batch(tokens, args.seed, vocabulary(args, args.padded_vocab_size) - 1)
    else:
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    tokens, labels = tokens.to(device), labels.to(device)
    lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=device)
    losses = model(tokens, lengths, labels)
    return losses, loss_function(labels, lengths, context_parallel_size=args.context_parallel_size)


def data_sets(numbers: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return tuple(BlendedMegatronDatasetBuilder(kind, numbers, lambda: True, config).build())
