"""Lets what tests build land on a GPU without a word in them, so that bodies written for gloo ranks run under NCCL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

_TESTS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


class OnDevice(TorchFunctionMode):
    """Tensors that a test's own code makes without naming a device, modules included, are made on `device`.

    What the library makes stays where it puts it: a device it forgot to pass is not papered over. Random numbers of a CPU generator
    are drawn on the CPU, so all ranks draw alike.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (
            torch.compiler.is_compiling() or not _asked_by_a_test()
        ):  # frames cannot be looked up while torch.compile traces
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            args, kwargs = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
            return func(*args, **kwargs).to(self.device)
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = self.device
        return func(*args, **kwargs)


def _asked_by_a_test() -> bool:
    """Whether the innermost frame outside torch is a test's."""
    frame = sys._getframe(2)
    while frame is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or not frame.f_code.co_filename.startswith("/")
    ):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_TESTS)
