"""Norms for stacks without Transformer Engine: apex's fused norm where it is installed, torch's otherwise."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RowNorm:
    """LayerNorm or RMSNorm of `config`, whose gradients are summed over TP under sequence parallelism.

    Constructing one returns the norm itself; specs take classes. Megatron's own wrapper of torch's norms refuses sequence
    parallelism. Raises ValueError for options that only fused norms have.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        fused = _apex_norm() if config.normalization == "LayerNorm" and torch.cuda.is_available() else None
        if fused is not None:
            return fused(config, hidden_size, eps=eps)
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma is set, but neither Transformer Engine nor apex is used here; install one, or set "
                "it to False"
            )
        kinds: dict[str, type[nn.Module]] = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(f"normalization is {config.normalization!r}; choose one of {sorted(kinds)}")
        norm = kinds[config.normalization](hidden_size, eps=eps).to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def _apex_norm() -> type[nn.Module] | None:
    try:
        from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM, FusedLayerNorm
    except ImportError:
        return None
    return FusedLayerNorm if HAVE_FUSED_LAYER_NORM else None
