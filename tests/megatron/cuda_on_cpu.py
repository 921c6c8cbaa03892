"""Lets Megatron-core's DDP, optimizers, schedules and recomputation run on CPU with gloo. For tests only.

Megatron-core asks torch.cuda for the current device and RNG state, allocates with device="cuda" and compares Tensor.type() with
CUDA names. Inside `cuda_on_cpu()` torch answers for the CPU instead; no attribute of megatron is touched, and torch is as it
was afterwards. Dropout and RNG trackers are not imitated, so models must be free of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _NoStream:
    """Stands for streams and events: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


class _Redirect(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _all_to_all_with_lists(
    output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """MoE dispatch copies its splits from the device to lists; on CPU it would leave them tensors."""
    sizes = [s.tolist() if torch.is_tensor(s) else s for s in (output_split_sizes, input_split_sizes)]
    return _all_to_all(output, input, *sizes, *args, **kwargs)


_all_to_all = torch.distributed.all_to_all_single


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    answers = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "manual_seed": lambda *_: None,
        "current_stream": lambda *_: _NoStream(),
        "default_stream": lambda *_: _NoStream(),
        "Stream": lambda *_, **__: _NoStream(),
        "Event": lambda *_, **__: _NoStream(),
        "stream": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: False,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.cuda.random, "get_rng_state", answers["get_rng_state"]))
        stack.enter_context(patch.object(torch.distributed, "all_to_all_single", _all_to_all_with_lists))
        stack.enter_context(_Redirect())
        yield
