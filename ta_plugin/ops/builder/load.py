"""Loading an operator: compiled where that is possible, in plain torch where not, and saying which."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.ops.builder.specs import OpSpec, op_specs, spec_of


@dataclass(frozen=True)
class LoadedOp:
    """An operator ready to be called.

    implementation: "compiled" or "fallback"
    reason:         where it came from, or why it is a fallback and how to change that
    """

    name: str
    implementation: Literal["compiled", "fallback"]
    reason: str
    call: Callable[..., Tensor]

    def __call__(self, *args: Any) -> Tensor:
        return self.call(*args)


def load_op(name: str, *, compile: bool = True) -> LoadedOp:
    """The operator `name`, for example "segment_sum"; with compile=False its plain torch form.

    Builds its extension on first use (half a minute; seconds from the cache). Where that cannot be, warns and returns the
    fallback. Raises ValueError for an unknown name.
    """
    fallbacks: dict[str, Callable[..., Tensor]] = {"segment_sum": segment_sum_in_torch}
    if name not in fallbacks:
        raise ValueError(f"name is {name!r}; choose one of {sorted(fallbacks)}")
    if not compile:
        return LoadedOp(name, "fallback", "as requested", fallbacks[name])
    registered = getattr(torch.ops.ta_plugin, name, None)
    if registered is not None:
        return LoadedOp(name, "compiled", f"torch.ops.ta_plugin.{name} is loaded", registered)
    spec = next(spec for spec in op_specs() if name in spec.operators)
    reason = _load(spec).reason
    if reason is None:
        torch.library.register_fake(f"ta_plugin::{name}", _segment_sum_shape)
        return LoadedOp(name, "compiled", f"from {spec.name}", getattr(torch.ops.ta_plugin, name))
    warnings.warn(f"{name} runs in plain torch, not compiled: {reason}", stacklevel=2)
    return LoadedOp(name, "fallback", reason, fallbacks[name])


@dataclass(frozen=True)
class LoadedExtension:
    """An extension of plain functions: its module, or the reason why there is none and how to change that."""

    kernels: Any | None
    reason: str | None


def load_extension(name: str) -> LoadedExtension:
    """The extension `name` of `op_specs()`, built ahead of time or now; warns where that fails. ValueError for an unknown name."""
    loaded = _load(spec_of(name))
    if loaded.reason is not None:
        warnings.warn(f"{name} is not used: {loaded.reason}", stacklevel=2)
    return loaded


def missing_extension(spec: OpSpec) -> str | None:
    """What keeps an extension from being loaded here, without building it; None if it is built, or can be on first use."""
    if _prebuilt(spec) is not None:
        return None
    try:
        from ta_plugin.ops.builder.classes import missing_for
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        return _NO_DEEPSPEED
    return missing_for(spec)


_NO_DEEPSPEED = "DeepSpeed, whose op builders compile it, is not installed; pip install ta_plugin[deepspeed]"


def _prebuilt(spec: OpSpec) -> Any | None:
    try:
        return importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name != spec.module:  # something it imports is missing, not the extension itself
            raise
        return None


def _load(spec: OpSpec) -> LoadedExtension:
    built = _prebuilt(spec)
    if built is not None:
        return LoadedExtension(built, None)
    try:
        from ta_plugin.ops.builder.classes import builder_of
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        return LoadedExtension(None, _NO_DEEPSPEED)
    builder = builder_of(spec)
    try:
        return LoadedExtension(builder.load(), None)
    except RuntimeError as error:  # what torch raises for a failed compilation, and DeepSpeed for a missing tool
        lines = str(error).splitlines()
        cause = next((line.strip() for line in lines if "error:" in line), lines[0])  # the compiler's first complaint
        return LoadedExtension(None, builder.error_log or f"building {spec.name} failed: {cause}")


def segment_sum_in_torch(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """values (M, F), order (M,) int64, offsets (U + 1,) int64 -> (U, F): the compiled operator's plain form."""
    if values.numel() == 0:
        return values.new_zeros(offsets.numel() - 1, values.shape[1])
    return F.embedding_bag(order, values, offsets, mode="sum", include_last_offset=True)


def _segment_sum_shape(values: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[1])
