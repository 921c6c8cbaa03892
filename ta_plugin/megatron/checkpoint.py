"""Saving and resuming through megatron.core.dist_checkpointing, in another layout of ranks if need be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

_NO_PARAMETER: Any = "no parameter"
_PARTS = ("dense", "owned")  # Megatron chains one optimizer for each bucket of gradients; a stage may lack the second


def checkpoint_metadata() -> dict[str, Any]:
    """The `metadata` of sharded_state_dict under which optimizer state loads in another layout.

    Megatron-LM's --dist-ckpt-optim-fully-reshardable asks for the same.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_checkpoint(path: str | os.PathLike[str], chunks: Sequence[nn.Module], optimizer: Any, **common: Any) -> None:
    """Save model chunks (wrapped or not), a Megatron optimizer or None, and plain values like the iteration. Collective.

    path: a directory that every rank sees; it is created, and must hold no checkpoint. Megatron's writer needs CUDA
    """
    if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(f"path is {path}, which holds a checkpoint already; save into another directory")
    os.makedirs(path, exist_ok=True)
    dist_checkpointing.save({**_state(chunks, optimizer, loading=False), "common": common}, str(path))


def load_checkpoint(path: str | os.PathLike[str], chunks: Sequence[nn.Module], optimizer: Any) -> dict[str, Any]:
    """Load what `save_checkpoint` saved, under any TP, PP, DP, CP and SSP sizes; returns the plain values. Collective."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ValueError(
            f"path is {path}, which holds no distributed checkpoint; pass the directory given to save_checkpoint"
        )
    loaded = dist_checkpointing.load(_state(chunks, optimizer, loading=True), str(path))
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        states = loaded["optimizer"]
        mine = _chained(optimizer)
        ready = [
            _with_hyperparameters(states[name], states[_PARTS[0]], part)
            for name, part in zip(_PARTS, mine, strict=False)
        ]
        for part, state in zip(mine, ready, strict=True):
            _load_part(part, state)
        if len(mine) > 1:
            optimizer._synchronize_steps()  # what ChainedOptimizer.load_state_dict ends with
    return loaded["common"]


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and Float16Module."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def _state(chunks: Sequence[nn.Module], optimizer: Any, loading: bool) -> dict[str, Any]:
    metadata = checkpoint_metadata()
    models = {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=dict(metadata))  # type: ignore[operator]
        for index, chunk in enumerate(chunks)
    }
    if optimizer is None:
        return dict(models)
    mine = _chained(optimizer)
    for part in mine:
        _allocate(part)
    counts = [_steps_of(part) for part in mine]
    parts = {}
    for name, part in zip(_PARTS, mine, strict=False):
        with _step_in_empty(part, max(counts)):
            parts[name] = part.sharded_state_dict(models, is_loading=loading, metadata=dict(metadata))
    return {**models, "optimizer": parts}


def _chained(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _with_hyperparameters(state: dict[str, Any], dense: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """`state` as loaded; where the saved run had no owned rows, their learning rate and step are those of the dense part."""
    nested = "optimizer" in dense  # all but the fp32 optimizer without sharding
    inner = state.get("optimizer", {}) if nested else state
    groups = inner.get("param_groups", [])
    if groups and all("lr" in group for group in groups):
        return state
    saved = dense["optimizer"] if nested else dense
    current = optimizer.state_dict()
    wanted = (current["optimizer"] if nested else current)["param_groups"]
    progress = {name: saved["param_groups"][0][name] for name in ("lr", "step") if name in saved["param_groups"][0]}
    inner = {**inner, "param_groups": [{**group, **progress} for group in wanted]}
    if "common_step" in saved.get("state", {}):
        inner["state"] = {**inner.get("state", {}), "common_step": saved["state"]["common_step"]}
    if not nested:
        return inner
    rest = {name: value for name, value in dense.items() if name not in ("optimizer", "param_state")}
    return {**rest, **state, "optimizer": inner}


def _load_part(optimizer: Any, state: dict[str, Any]) -> None:
    if "param_state" not in state or not isinstance(optimizer.optimizer, torch.optim.Adam):
        optimizer.load_state_dict(state)
        return
    # Megatron's loader expects a fused Adam: it knows no "step" per parameter, and would share one tensor among all
    optimizer.load_state_dict({name: value for name, value in state.items() if name != "param_state"})
    inner = list(optimizer.optimizer.state.values())
    steps = [of_parameter.pop("step") for of_parameter in inner]
    optimizer.load_parameter_state_from_fully_reshardable(state["param_state"])
    for of_parameter, step in zip(inner, steps, strict=True):
        of_parameter["step"] = step.clone()


def _allocate(optimizer: Any) -> None:
    """State of a torch Adam that has not stepped: without apex and Transformer Engine, Megatron's distributed optimizer needs it."""
    inner = optimizer.optimizer
    if isinstance(inner, torch.optim.Adam) and not inner.state:
        for group in inner.param_groups:
            for p in group["params"]:
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[p] = {"step": torch.zeros(()), **zeros}


def _steps_of(optimizer: Any) -> float:
    """How many steps a torch Adam took; 0 for other optimizers, which keep the number in their groups."""
    states = optimizer.optimizer.state.values()
    return max((float(state["step"]) for state in states if torch.is_tensor(state.get("step"))), default=0.0)


@contextmanager
def _step_in_empty(optimizer: Any, steps: float) -> Iterator[None]:
    """A torch Adam without parameters, as on stages and ranks that own no row, knows the step number inside the block.

    Megatron's distributed optimizer reads the number from the parameters' states, and asserts that there is one; the ranks that
    have parameters would then wait in the collectives of the save for those that have none.
    """
    inner = optimizer.optimizer
    lacking = isinstance(optimizer, DistributedOptimizer) and isinstance(inner, torch.optim.Adam) and not inner.state
    if lacking:
        inner.state[_NO_PARAMETER] = {"step": torch.tensor(steps)}
    try:
        yield
    finally:
        if lacking:
            inner.state.pop(_NO_PARAMETER, None)
