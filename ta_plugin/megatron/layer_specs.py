"""Layer specs: what TransformerBlock takes, and `--spec ta_plugin.megatron.layer_specs causal_layer_spec` or tokenized_layer_spec."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from ta_plugin.megatron.core_attention import SDPACoreAttention, TokenizedCoreAttention, TokenizedSelfAttention
from ta_plugin.megatron.first_layer import FirstLayerAttention
from ta_plugin.megatron.layers import PositionTransformerLayer, TokenizedTransformerLayer
from ta_plugin.megatron.moe import MultiplicityRouter
from ta_plugin.megatron.norm import RowNorm


def get_tokenized_layer_spec(
    config: TransformerConfig | None = None, *, use_transformer_engine: bool | None = None
) -> ModuleSpec:
    """A TransformerLayer over distinct rows: linear, norm and MLP or MoE modules of Megatron, our core attention.

    config: num_moe_experts, moe_grouped_gemm, qk_layernorm and multi_latent_attention are read from it; dense by default
    use_transformer_engine: by default where it is installed; local modules otherwise

    Every refusal of `refusals.check_layer` is raised when a layer is built from the spec.
    """
    engine = has_transformer_engine() if use_transformer_engine is None else use_transformer_engine
    stock = stock_spec(config, engine)
    slots = stock.submodules
    attention = ModuleSpec(
        module=TokenizedSelfAttention,
        params={**slots.self_attention.params, "attn_mask_type": AttnMaskType.no_mask},
        submodules=replace(slots.self_attention.submodules, core_attention=TokenizedCoreAttention),
    )
    return ModuleSpec(
        module=TokenizedTransformerLayer,
        params=dict(stock.params or {}),
        submodules=replace(
            slots, self_attention=attention, mlp=_weighted(slots.mlp, bool(getattr(config, "num_moe_experts", None)))
        ),
    )


def get_causal_layer_spec(
    config: TransformerConfig | None = None, *, use_transformer_engine: bool | None = None
) -> ModuleSpec:
    """A stock causal TransformerLayer whose core attention, in the first layer of a model, holds equal keys once.

    For models that give layers no tokens, Megatron-LM's pretrain_gpt.py among them. The layers above are stock. To save anything the
    first layer must be free of positions (position_embedding_type "none", or "rope" with no_rope_freq 1 for it) and the embedding
    of dropout; with positions no keys are equal, and it computes the same for a little more.
    """
    engine = has_transformer_engine() if use_transformer_engine is None else use_transformer_engine
    stock = stock_spec(config, engine)
    attention = stock.submodules.self_attention
    core = type("FirstLayerAttention", (FirstLayerAttention,), {"stock": attention.submodules.core_attention})
    attention = _with(attention, submodules=replace(attention.submodules, core_attention=core))
    return _with(stock, submodules=replace(stock.submodules, self_attention=attention))


def get_mixed_block_spec(
    config: TransformerConfig,
    num_tokenized_layers: int,
    *,
    causal: bool = False,
    use_transformer_engine: bool | None = None,
    use_sdpa: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """A stack whose first layers are tokenized and whose others are stock layers over positions, this pipeline stage's part.

    num_tokenized_layers: of the whole stack; the first stock layer expands the rows
    causal: the stock layers' mask. Rotary positions reach only them when config.no_rope_freq is 1 for the tokenized layers
    use_sdpa: torch's scaled_dot_product_attention in local stock layers, for a CPU: Megatron's own asks for a CUDA device

    Raises ValueError unless 0 <= num_tokenized_layers <= config.num_layers.
    """
    if not 0 <= num_tokenized_layers <= config.num_layers:
        raise ValueError(
            f"num_tokenized_layers is {num_tokenized_layers}; it must lie in [0, {config.num_layers}], the number of layers"
        )
    engine = has_transformer_engine() if use_transformer_engine is None else use_transformer_engine
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    tokenized = get_tokenized_layer_spec(config, use_transformer_engine=engine)
    layers = [
        tokenized
        if n < num_tokenized_layers
        else _position_spec(config, engine, n == num_tokenized_layers, causal, use_sdpa)
        for n in numbers
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm(engine))


def get_block_spec(
    config: TransformerConfig, layer_spec: ModuleSpec, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """`layer_spec` for every layer of this pipeline stage, and a final norm that knows sequence parallelism."""
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    engine = layer_spec.submodules.input_layernorm is not RowNorm
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * count, layer_norm=final_norm(engine))


def final_norm(use_transformer_engine: bool) -> type:
    """The class of the norm after the last layer."""
    if not use_transformer_engine:
        return RowNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported."""
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        return False
    return True


def stock_spec(config: TransformerConfig | None, engine: bool) -> ModuleSpec:
    options: dict[str, Any] = {
        "num_experts": getattr(config, "num_moe_experts", None),
        "moe_grouped_gemm": getattr(config, "moe_grouped_gemm", False),
        "qk_layernorm": getattr(config, "qk_layernorm", False),
        "multi_latent_attention": False,  # refused when a layer is built
    }
    if engine:
        return get_gpt_layer_with_transformer_engine_spec(**options)
    stock = get_gpt_layer_local_spec(**options)
    attention = stock.submodules.self_attention
    norms = {
        slot: RowNorm
        for slot in ("q_layernorm", "k_layernorm")
        if getattr(attention.submodules, slot, IdentityOp) is not IdentityOp
    }
    attention = _with(attention, submodules=replace(attention.submodules, **norms))
    slots = replace(stock.submodules, input_layernorm=RowNorm, pre_mlp_layernorm=RowNorm, self_attention=attention)
    return _with(stock, submodules=slots)


def _position_spec(config: TransformerConfig, engine: bool, expands: bool, causal: bool, use_sdpa: bool) -> ModuleSpec:
    stock = stock_spec(config, engine)
    mask = AttnMaskType.padding_causal if causal and engine else AttnMaskType.causal if causal else AttnMaskType.padding
    attention = stock.submodules.self_attention
    attention = _with(attention, params={**attention.params, "attn_mask_type": mask})
    if use_sdpa and not engine:
        attention = _with(attention, submodules=replace(attention.submodules, core_attention=SDPACoreAttention))
    return ModuleSpec(
        module=PositionTransformerLayer,
        params={**(stock.params or {}), "expands": expands, "causal": causal},
        submodules=replace(stock.submodules, self_attention=attention),
    )


def _weighted(mlp: Any, expected: bool) -> Any:
    """The MLP slot with its router, if it has one, counting occurrences: a ModuleSpec, or from 0.19 on a partial."""
    if hasattr(getattr(mlp, "submodules", None), "router"):
        return _with(mlp, submodules=replace(mlp.submodules, router=MultiplicityRouter))
    if isinstance(mlp, partial) and hasattr(mlp.keywords.get("submodules"), "router"):
        slots = replace(mlp.keywords["submodules"], router=MultiplicityRouter)
        return partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": slots})
    if expected:
        raise RuntimeError(
            f"no router slot found in {mlp!r}; this version of megatron-core builds its experts in another way"
        )
    return mlp


def _with(spec: ModuleSpec, **changes: Any) -> ModuleSpec:
    changed = copy(spec)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


tokenized_layer_spec = get_tokenized_layer_spec()  # --spec wants an object, not a function
causal_layer_spec = get_causal_layer_spec()
