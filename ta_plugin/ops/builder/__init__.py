"""Compiling the operators of csrc/ with DeepSpeed's op builders, on first use or from setup.py; importing this builds nothing."""

from ta_plugin.ops.builder.load import LoadedOp, load_op
from ta_plugin.ops.builder.specs import OpSpec, op_specs, spec_of

__all__ = ["LoadedOp", "OpSpec", "load_op", "op_specs", "spec_of"]
