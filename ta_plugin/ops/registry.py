"""The operators of csrc/: one schema, gradient and fake kernel each, whichever implementation runs behind them.

Nothing is registered on import. The first call of an operator defines torch.ops.ta_plugin.<name>; which code runs is decided so:

CPU:   the compiled operator where it was built ahead of time (TA_BUILD_OPS=1) or loaded by `load_op`, otherwise its torch
       form. A call never compiles.
CUDA:  the compiled operator, built ahead of time or just in time by the first call; where that cannot be, one warning says
       why, and the torch form runs from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ta_plugin.ops.builder import OpSpec, build, op_specs, prebuilt


@dataclass(frozen=True)
class Operator:
    """One operator, called with the arguments of its schema; the first is a tensor, whose device decides what runs.

    schema:        what follows the name, "(Tensor values, ...) -> Tensor"
    in_torch:      the same function in plain torch: fallback and oracle
    fake:          outputs by shape only, for torch.compile and fake tensors
    setup_context: with `backward` as in torch.autograd.Function; both None where nothing is differentiable
    """

    name: str
    schema: str
    in_torch: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None
    backward: Callable[..., Any] | None = None
    ready: set[str] = field(default_factory=set, compare=False, repr=False)  # devices with a kernel; they stay so

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        device, traced = first.device.type, torch.compiler.is_compiling()
        if traced or device not in self.ready:
            if device not in ("cpu", "cuda") or not (is_compiled(self.name, device) or make_ready(self, device)):
                return self.plain(first, *rest)
            if traced:
                return getattr(torch.ops.ta_plugin, self.name)(first, *rest)
            self.ready.add(device)
        return self.compiled(first, *rest)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """torch.ops.ta_plugin.<name> in eager mode: the same kernel and gradient, without what torch.library does per call."""
        kernel = getattr(torch.ops.ta_plugin, self.name).default
        if self.backward is None:
            return kernel

        def run(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return kernel(*inputs)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            self.setup_context(ctx, inputs, output)  # type: ignore[misc]
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(self.backward)}
        with_gradient = type(self.name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

        def call(*inputs: Any) -> Any:
            flows = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            return with_gradient(*inputs) if flows else run(*inputs)

        return call

    @cached_property
    def plain(self) -> Callable[..., Any]:
        """`in_torch` with the operator's gradient."""
        if self.backward is None:
            return self.in_torch
        methods = {"forward": self.in_torch, "setup_context": self.setup_context, "backward": self.backward}
        function = type(self.name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items() if f})
        return function.apply  # type: ignore[attr-defined]


@torch.compiler.assume_constant_result  # what is compiled does not change under a compiled graph
def is_compiled(name: str, device: str) -> bool:
    """Whether torch.ops.ta_plugin.<name> is defined and has a kernel of its own for "cpu" or "cuda"."""
    return hasattr(torch.ops.ta_plugin, name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"ta_plugin::{name}", device.upper()
    )


@torch.compiler.disable
def make_ready(operator: Operator, device: str) -> bool:
    """Define an operator, and get its kernel as the module's docstring says; whether there is one now."""
    define(operator)
    if not is_compiled(operator.name, device) and device == "cuda":
        reason = load_kernel(operator.name, device)
        if reason is not None:
            warnings.warn(f"{operator.name} runs in plain torch, not compiled: {reason}", stacklevel=3)
            torch.library.impl(f"ta_plugin::{operator.name}", "CUDA", operator.in_torch)  # no second try
    return is_compiled(operator.name, device)


def define(operator: Operator) -> None:
    """torch.ops.ta_plugin.<name>, once per process, with the CPU kernel if one was built ahead of time."""
    if hasattr(torch.ops.ta_plugin, operator.name):
        return
    qualified = f"ta_plugin::{operator.name}"
    torch.library.define(qualified, operator.schema)
    torch.library.register_fake(qualified, operator.fake)
    if operator.backward is not None:
        torch.library.register_autograd(qualified, operator.backward, setup_context=operator.setup_context)
    spec = _spec(operator.name, "cpu")
    if spec is not None:
        prebuilt(spec)


def load_kernel(name: str, device: str) -> str | None:
    """The extension that holds an operator's kernel, built if need be; what is missing, or None."""
    spec = _spec(name, device)
    return f"there is no {device.upper()} kernel" if spec is None else build(spec)


def _spec(name: str, device: str) -> OpSpec | None:
    return next((spec for spec in op_specs() if spec.device == device and name in spec.operators), None)
