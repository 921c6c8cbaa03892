"""Imports paid piece by piece, each within a pool's time limit: Megatron-core takes long on a busy machine."""

from __future__ import annotations

import gc
import importlib
import sys

MODULES = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "megatron.core.parallel_state",
    "megatron.core.transformer.transformer_config",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "layouts",
)


def load(name: str) -> None:
    if name not in sys.modules:
        importlib.import_module(name)
        gc.collect()
        gc.freeze()  # what imports leave stays: to collect what a test leaves, nobody needs to look at it
