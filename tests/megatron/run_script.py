"""Runs a training script of megatron.training on CPU with gloo: python run_script.py SCRIPT ARGUMENTS, on each rank. For tests only.

Beside what cuda_on_cpu answers, megatron.training asks whether there is CUDA, moves modules, and reads properties and memory of a device.
"""

from __future__ import annotations

import collections
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from cuda_on_cpu import cuda_on_cpu


def main() -> None:
    script = sys.argv.pop(1)
    sys.path[0] = str(Path(script).parent)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda *_: None,
        "set_stream": lambda *_: None,
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 34, major=9, minor=0, name="cpu"),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "cpu",
        "memory_stats": lambda *_: collections.defaultdict(int),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = lambda *_: 0
    with cuda_on_cpu():
        for name, answer in answers.items():
            patch.object(torch.cuda, name, answer).start()
        patch.object(torch.accelerator, "is_available", lambda: False).start()  # torch's own optimizers ask it
        patch.object(torch.nn.Module, "cuda", lambda module, *_: module).start()
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
