"""Compiling the operators of csrc/ with DeepSpeed's op builders, on first use or from setup.py; importing this builds nothing."""

from ta_plugin.ops.builder.load import LoadedExtension, LoadedOp, load_extension, load_op, missing_extension
from ta_plugin.ops.builder.specs import OpSpec, op_specs, spec_of

__all__ = [
    "LoadedExtension",
    "LoadedOp",
    "OpSpec",
    "load_extension",
    "load_op",
    "missing_extension",
    "op_specs",
    "spec_of",
]
