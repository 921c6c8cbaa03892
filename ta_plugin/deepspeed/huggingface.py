"""Hugging Face models through an attention function under our own key of transformers' registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ta_plugin.attention import Scoring, self_attention
from ta_plugin.deepspeed.plan import TokenPlan

KEY = "tokenized_attention"


def tokenized_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, H, L, D), key and value (B, Hk, L, D) -> (B, L, H, D), None.

    Modules that the block does not name, layers under the same model that do not qualify, and calls with a mask where the block names no
    lengths run transformers' own SDPA.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plan: TokenPlan | None = getattr(module, "_token_plan", None)
    grids = [x.transpose(1, 2) for x in (query, key, value)]
    if plan is None or dropout or not plan.knows(attention_mask) or not all(plan.fits(grid) for grid in grids):
        fallback = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return fallback(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    plan.check_once(module, type(module).__name__, *grids)
    assert plan.space is not None
    rows = [plan.rows_of(grid) for grid in grids]
    scoring = module._token_scoring
    assert isinstance(scoring, Scoring)
    return plan.space.expand(self_attention(plan.space, *rows, scoring=replace(scoring, scale=scaling))), None


def why_not_huggingface(model: nn.Module, module: nn.Module) -> str | None:
    """What keeps a module from being run on distinct tokens, or None."""
    if not hasattr(getattr(model, "config", None), "_attn_implementation"):
        return f"{type(module).__name__} is neither an nn.MultiheadAttention nor part of a Hugging Face model"
    if getattr(module, "is_causal", False):
        return "it is causal: keys above the first layer depend on what came before"
    return None


def tokenize_huggingface(model: nn.Module, module: nn.Module, plan: TokenPlan, scoring: Scoring) -> None:
    """Let `module` of a Hugging Face model attend through `tokenized_attention_forward`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KEY, tokenized_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(KEY, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    module._token_plan, module._token_scoring = plan, scoring  # type: ignore[assignment]
    model.config._attn_implementation = KEY  # type: ignore[union-attr]
