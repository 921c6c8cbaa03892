"""Ending a training run at the end of a step instead of in the middle of one."""

from __future__ import annotations

import signal
from typing import Any


class StopFlag:
    """Called, says whether Ctrl-C or SIGTERM came since it was made; the training loop then saves and ends.

    Ranks hear of a signal at different times: reduce the answer over them before acting on it.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True

    def __call__(self) -> bool:
        return self.requested
