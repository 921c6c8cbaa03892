"""What a tokenized layer cannot compute exactly is refused when it is built, with the remedy (DESIGN section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


def check_layer(config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str) -> None:
    """Raise ValueError for a core attention over distinct rows that would differ from attention over positions."""
    check_dropout(config, "attention_dropout", "hidden_dropout")
    if attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"attn_mask_type is {attn_mask_type.name}; equal tokens see different prefixes under a causal mask, so they share no "
            "row. Use ta_plugin.megatron.get_tokenized_layer_spec, whose layers are bidirectional (AttnMaskType.no_mask), and stock "
            "layers where causality is needed"
        )
    check_core(config, attention_type)
    check_positions(getattr(config, "position_embedding_type", None), "config.position_embedding_type")
    _check_moe(config)


def check_core(config: TransformerConfig, attention_type: str) -> None:
    """Refuse what no core attention of ours computes: anything but softmax self-attention onto all that the mask allows."""
    if attention_type != "self":
        raise ValueError(f"attention_type is {attention_type!r}; tokenized layers are self-attention ('self')")
    if getattr(config, "multi_latent_attention", False):
        raise ValueError(
            "multi_latent_attention is set; it rotates keys by position. Set it to False for tokenized layers"
        )
    if getattr(config, "window_size", None) is not None:
        raise ValueError(
            f"window_size is {config.window_size}; distinct rows have no position to be near to. Set window_size=None"
        )
    softmax = getattr(config, "softmax_type", "vanilla")
    if softmax != "vanilla":
        raise ValueError(f"softmax_type is {softmax!r}; tokenized attention has no sink. Set softmax_type='vanilla'")
    if getattr(config, "fp8_dot_product_attention", False):
        raise ValueError("fp8_dot_product_attention is set; set it to False, tokenized attention runs in bf16 or wider")


def check_positions(position_embedding_type: str | None, name: str = "position_embedding_type") -> None:
    """Refuse position embeddings where layers are tokenized."""
    if position_embedding_type not in (None, "none"):
        raise ValueError(
            f"{name} is {position_embedding_type!r}; with positions equal tokens have different hidden states. Use 'none', and "
            "bring order in through composite ids, or in stock layers above the tokenized ones (get_mixed_block_spec)"
        )


def check_model(config: TransformerConfig, row_capacity: int | Sequence[int] | None, mixed: bool) -> None:
    """Refuse what a whole tokenized model cannot do."""
    capacities = [row_capacity] if isinstance(row_capacity, int) else row_capacity
    if capacities is not None and (not capacities or min(capacities) < 1):
        raise ValueError(f"row_capacity is {row_capacity}; pass one or more numbers of rows, each 1 or more, or None")
    stages = config.pipeline_model_parallel_size
    if stages > 1 and row_capacity is None and not config.variable_seq_lengths:
        raise ValueError(
            "variable_seq_lengths is False with pipeline parallelism; every microbatch has its own number of distinct rows, so "
            "set variable_seq_lengths=True (and moe_token_dispatcher_type='alltoall', which Megatron wants with it), or give the "
            "model a row_capacity"
        )
    if stages > 1 and not config.variable_seq_lengths and not isinstance(row_capacity, int):
        raise ValueError(
            f"row_capacity is {row_capacity} with pipeline parallelism and variable_seq_lengths False, where there is one shape; "
            "pass one number, or set variable_seq_lengths=True"
        )
    if stages == 2 and config.virtual_pipeline_model_parallel_size and config.variable_seq_lengths:
        raise ValueError(
            "variable_seq_lengths is True with an interleaved schedule on 2 pipeline stages, where Megatron mixes up the shapes of "
            "activations and gradients; set it to False and give the model a row_capacity, or use more stages"
        )
    if stages > 1 and mixed and row_capacity is not None:
        raise ValueError(
            f"row_capacity is {row_capacity} in a mixed stack under pipeline parallelism; rows and positions cross stages in different "
            "shapes. Set row_capacity=None and variable_seq_lengths=True"
        )
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(
            f"mtp_num_layers is {config.mtp_num_layers}; multi-token prediction needs positions. Set it to None"
        )


def check_rotary(config: TransformerConfig, tokenized: list[bool], first: int) -> None:
    """Refuse rotary positions that would reach tokenized layers; `tokenized` says which of the layers from `first` on are."""
    free = config.no_rope_freq or [0] * config.num_layers
    reached = [first + i for i, yes in enumerate(tokenized) if yes and not free[first + i]]
    if reached:
        raise ValueError(
            f"rotary_base is set, and no_rope_freq is {config.no_rope_freq}, so tokenized layers {[n + 1 for n in reached]} would be given "
            "positions; set config.no_rope_freq to a list with 1 for each tokenized layer and 0 for each stock layer"
        )
    if config.rotary_interleaved:
        raise ValueError("rotary_interleaved is set; rotary_base gives halves rotated together, set it to False")


def check_dropout(config: TransformerConfig, *names: str) -> None:
    """Refuse these dropouts of the config: no dropout of occurrences is dropout of rows."""
    for name in names:
        if getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)}; it would drop all occurrences of a token together. Set {name}=0.0"
            )


def _check_moe(config: TransformerConfig) -> None:
    if not config.num_moe_experts:
        return
    if config.moe_expert_capacity_factor is not None:
        raise ValueError(
            f"moe_expert_capacity_factor is {config.moe_expert_capacity_factor}; which occurrence is dropped depends on its position. "
            "Set it to None"
        )
    if config.moe_input_jitter_eps is not None:
        raise ValueError(
            f"moe_input_jitter_eps is {config.moe_input_jitter_eps}; occurrences of a token would share their noise. Set it to None"
        )
    if config.moe_z_loss_coeff is not None:
        raise ValueError(
            f"moe_z_loss_coeff is {config.moe_z_loss_coeff}; it is not weighted by multiplicity. Set it to None"
        )
    balancing = config.moe_router_load_balancing_type
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind not in ("aux_loss", "global_aux_loss", "none"):
            raise ValueError(
                f"moe_router_load_balancing_type is {kind!r}; only 'aux_loss', 'global_aux_loss' and 'none' are weighted by multiplicity"
            )
