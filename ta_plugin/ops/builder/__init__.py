"""Compiling the operators of csrc/ with DeepSpeed's op builders, on first use or from setup.py; importing this builds nothing."""

from ta_plugin.ops.builder.load import build
from ta_plugin.ops.builder.specs import OpSpec, op_specs, spec_of

__all__ = ["OpSpec", "build", "op_specs", "spec_of"]
