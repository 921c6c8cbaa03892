"""Work on the device that nothing waits for yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Beside:
    """Lets work run beside what follows until `join`: inside a CUDA graph on branches of it, which cost nothing; elsewhere in line.

    What the work returns may be used after `join` only, and every call that does work joins, so that no capture ends with a branch.

    lasts: backward ends it, or whoever made this, by `end`, so that a branch may go on into backward
    """

    def __init__(self, device: torch.device, lasts: bool = False) -> None:
        self._device = device
        self._capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.lasts = lasts
        self._branches: dict[str, torch.cuda.Stream] = {}
        self._late: set[str] = set()
        self._kept: dict[str, list[Tensor]] = {}

    @contextmanager
    def work(self, name: str, *read: Tensor, behind: Sequence[str] = ()) -> Iterator[None]:
        """Runs what is done inside on the branch of this name, after all that was done before, there, here and on branches `behind`.

        read: the tensors from outside that it reads, kept until `join`: memory that is freed here is used again without waiting
        """
        if not self._capturing:
            yield
            return
        if name not in self._branches:
            # first in line for multiprocessors: what waits for a branch waits for all of it
            self._branches[name] = torch.cuda.Stream(self._device, priority=-1)
        branch = self._branches[name]
        self._kept.setdefault(name, []).extend(read)
        branch.wait_stream(torch.cuda.current_stream(self._device))
        for other in behind:
            if other in self._branches:
                branch.wait_stream(self._branches[other])
        # tensors made here and used by the stream that joins need no more care: work begins by waiting for all that stream did
        with torch.cuda.stream(branch):
            yield

    def later(self, name: str) -> int:
        """Leave a branch out of `join`, to `end`. Returns its handle for kernels that choose their streams themselves; 0 in line."""
        if name not in self._branches:
            return 0
        self._late.add(name)
        return self._branches[name].cuda_stream

    def wait(self, name: str) -> None:
        """Wait for what was done on a branch until now, if there is one."""
        if name in self._branches:
            torch.cuda.current_stream(self._device).wait_stream(self._branches[name])

    def join(self) -> None:
        for name in self._branches.keys() - self._late:
            self.wait(name)
            self._kept.pop(name, None)

    def end(self) -> None:
        """Join what `later` left out, too."""
        self._late.clear()
        self.join()
