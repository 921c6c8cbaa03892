"""Loading an operator by name: compiled where that is possible, in plain torch where not, and saying which."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ta_plugin.ops.buckets import BOUNDS, BUCKET, COMPACT, SPREAD
from ta_plugin.ops.merging import MERGE, MERGE_BACKWARD, MERGE_INTO
from ta_plugin.ops.planning import GROUP, LOCAL_ROWS, OWNERS, PARTITION, UNIQUE
from ta_plugin.ops.registry import Operator, define, is_compiled, load_kernel
from ta_plugin.ops.segments import EXPAND, SEGMENT_LOGSUMEXP, SEGMENT_SUM
from ta_plugin.ops.target import TARGET_ATTENTION, TARGET_ATTENTION_BACKWARD


@dataclass(frozen=True)
class LoadedOp:
    """An operator ready to be called.

    implementation: "compiled" or "fallback"
    reason:         where it came from, or why it is a fallback and how to change that
    """

    name: str
    implementation: Literal["compiled", "fallback"]
    reason: str
    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def operators() -> dict[str, Operator]:
    """Every operator under torch.ops.ta_plugin, by name."""
    rows = (SEGMENT_SUM, SEGMENT_LOGSUMEXP, EXPAND, MERGE, MERGE_INTO, MERGE_BACKWARD)
    plan = (UNIQUE, GROUP, OWNERS, LOCAL_ROWS, PARTITION, BUCKET, BOUNDS, COMPACT, SPREAD)
    attention = (TARGET_ATTENTION, TARGET_ATTENTION_BACKWARD)
    return {op.name: op for op in (*rows, *plan, *attention)}


def load_op(name: str, *, device: Literal["cpu", "cuda"] = "cpu", compile: bool = True) -> LoadedOp:
    """The operator `name`, for example "segment_sum", compiled for a device; with compile=False its plain torch form.

    Builds its extension on first use (a minute; seconds from the cache). From then on everything that calls the operator in
    this process uses it. Where it cannot be built, warns and returns the fallback. Raises ValueError for an unknown name.
    """
    known = operators()
    if name not in known:
        raise ValueError(f"name is {name!r}; choose one of {sorted(known)}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; pass 'cpu' or 'cuda'")
    operator = known[name]
    if not compile:
        return LoadedOp(name, "fallback", "as requested", operator.plain)
    define(operator)
    if is_compiled(name, device):
        return LoadedOp(name, "compiled", f"torch.ops.ta_plugin.{name} is loaded", getattr(torch.ops.ta_plugin, name))
    reason = load_kernel(name, device)
    if reason is None:
        return LoadedOp(name, "compiled", "its extension was just loaded", getattr(torch.ops.ta_plugin, name))
    warnings.warn(f"{name} runs in plain torch, not compiled: {reason}", stacklevel=2)
    return LoadedOp(name, "fallback", reason, operator.plain)
