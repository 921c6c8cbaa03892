from __future__ import annotations

import signal

from ta_plugin.models.stopping import StopFlag


def test_a_signal_is_remembered_until_the_loop_asks() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            stop = StopFlag()
            assert not stop()
            signal.raise_signal(number)
            assert stop() and stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
