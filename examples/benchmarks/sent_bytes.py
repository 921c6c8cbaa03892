"""What collectives are handed, counted below every library: for layers of ours and of others alike."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Counts, per kind of collective, the bytes this rank has to send to others of the default group, forward and backward.

    Torch hands every collective of a process group to its dispatcher, whichever library called it, and autograd's threads
    inherit the mode. What a rank keeps of an all-to-all does not count; an all-gather counts a rank's part once per other rank, an
    all-reduce twice (N - 1) / N of its buffer. An operator that is none of these raises NotImplementedError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space in ("c10d", "_c10d_functional"):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        others, n = self.ranks - 1, self.ranks
        if name in ("recv_", "wait_tensor", "barrier", "_wrap_tensor_autograd"):
            return
        if name == "send":
            sent = sum(_size(x) for x in args[0])
        elif name == "alltoall_base_":  # (output, input, group, output splits, input splits)
            sent = self._apart(args[1], args[4])
        elif name == "all_to_all_single":  # (input, output splits, input splits, group)
            sent = self._apart(args[0], args[2])
        elif name == "_allgather_base_":  # (output, input, group)
            sent = others * _size(args[1])
        elif name == "all_gather_into_tensor":  # (input, ranks, group)
            sent = others * _size(args[0])
        elif name in ("_reduce_scatter_base_", "reduce_scatter_tensor"):
            sent = others * _size(args[1 if name[0] == "_" else 0]) // n
        elif name == "allreduce_":
            sent = sum(2 * others * _size(x) // n for x in args[0])
        else:
            raise NotImplementedError(f"{name} is not counted; add it to SentBytes")
        self.bytes[name] += sent

    def _apart(self, x: Tensor, splits: list[int]) -> int:
        """Of an all-to-all's input, what is for others; equal parts where no splits are given."""
        if not splits:
            return (self.ranks - 1) * _size(x) // self.ranks
        return _size(x) * (sum(splits) - splits[self.rank]) // max(sum(splits), 1)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def nvlink_bytes(device: int) -> int | None:
    """Data this GPU has sent over all its NVLinks since it was started, by its own counters (in KiB); None where it has none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", str(device)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    links = re.findall(r"Tx:\s*(\d+)\s*KiB", found)
    return 1024 * sum(map(int, links)) if links else None
