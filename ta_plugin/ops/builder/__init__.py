"""Compiling the operators of csrc/ with DeepSpeed's op builders, on first use or from setup.py; importing this builds nothing."""

from ta_plugin.ops.builder.load import LoadedExtension, build, load_extension, missing_extension, prebuilt
from ta_plugin.ops.builder.specs import OpSpec, op_specs, spec_of

__all__ = [
    "LoadedExtension",
    "OpSpec",
    "build",
    "load_extension",
    "missing_extension",
    "op_specs",
    "prebuilt",
    "spec_of",
]
