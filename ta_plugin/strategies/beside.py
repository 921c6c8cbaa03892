"""Work on the device that nothing waits for yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """Lets work run beside what follows until `join`: inside a CUDA graph on a branch of it, which costs nothing; elsewhere in line.

    What the work returns may be used after `join` only, and every call that does the work joins, so that no capture ends with a branch.
    """

    def __init__(self, device: torch.device) -> None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._stream = torch.cuda.Stream(device) if capturing else None

    @contextmanager
    def work(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        # Tensors made here and used by the stream that joins need no more care: a branch begins by waiting for all that stream did
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
