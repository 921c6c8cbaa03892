"""Loading an extension, built on first use, or saying what keeps it from being built."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ta_plugin.ops.builder.specs import OpSpec, spec_of


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


def build(spec: OpSpec) -> str | None:
    """Load an extension whose import registers operators, compiling it if need be (a minute; seconds from the cache).

    Returns None, or what went wrong and how to change that.
    """
    return _load(spec).reason


def missing_extension(spec: OpSpec) -> str | None:
    """What keeps an extension from being loaded here, without building it; None if it is built, or can be on first use."""
    if prebuilt(spec) is not None:
        return None
    try:
        from ta_plugin.ops.builder.classes import missing_for
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        return _NO_DEEPSPEED
    return missing_for(spec)


_NO_DEEPSPEED = (
    "DeepSpeed, whose op builders compile it, is not installed; pip install deepspeed, or in a checkout of ta_plugin "
    'pip install ".[deepspeed]"'
)


def prebuilt(spec: OpSpec) -> Any | None:
    """An extension that setup.py built, imported, which registers its operators; None where there is none that loads here, with a
    warning where there is one."""
    try:
        return importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        if error.name != spec.module:  # something it imports is missing, not the extension itself
            raise
        return None
    except ImportError as error:  # symbols that this torch does not have
        warnings.warn(
            f"{error.path or spec.module} does not load with torch {torch.__version__} ({error}) and is left out, as if built for another "
            f"version; build it again ({spec.build_variable}=1 python setup.py build_ext --inplace, or pip install again) or delete it",
            stacklevel=2,
        )
        return None


def _load(spec: OpSpec) -> LoadedExtension:
    built = prebuilt(spec)
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
