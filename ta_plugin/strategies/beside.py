"""Work on the device that nothing waits for yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Beside:
    """Lets work run beside what follows until `join`: inside a CUDA graph on branches of it, which cost nothing; elsewhere in line.

    What the work returns may be used after `join` only, and every call that does work joins, so that no capture ends with a branch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._branches: dict[str, torch.cuda.Stream] = {}
        self._kept: list[Tensor] = []

    @contextmanager
    def work(self, name: str, *read: Tensor) -> Iterator[None]:
        """Runs what is done inside on the branch of this name, after all that was done before, there and here.

        read: the tensors from outside that it reads, kept until `join`: memory that is freed here is used again without waiting
        """
        if not self._capturing:
            yield
            return
        if name not in self._branches:
            # first in line for multiprocessors: what waits for a branch waits for all of it
            self._branches[name] = torch.cuda.Stream(self._device, priority=-1)
        branch = self._branches[name]
        self._kept.extend(read)
        branch.wait_stream(torch.cuda.current_stream(self._device))
        # tensors made here and used by the stream that joins need no more care: work begins by waiting for all that stream did
        with torch.cuda.stream(branch):
            yield

    def join(self) -> None:
        for branch in self._branches.values():
            torch.cuda.current_stream(self._device).wait_stream(branch)
        self._kept.clear()
