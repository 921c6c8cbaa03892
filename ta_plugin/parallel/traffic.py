"""What each collective put on the wire, counted at its buffers."""

from __future__ import annotations

import math
from collections import Counter

from torch import Tensor


class Traffic:
    """Elements and bytes this rank sent to other ranks, and in how many collectives, by the name each call gave its payload.

    Only what leaves the rank counts: the share of an all-to-all that a rank keeps for itself does not.
    """

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def record(self, name: str, payload: Tensor, rows_sent: int) -> None:
        """Count `rows_sent` rows of `payload` (rows, ...) under `name`."""
        elements = rows_sent * math.prod(payload.shape[1:])
        self.elements[name] += elements
        self.bytes[name] += elements * payload.element_size()
        self.calls[name] += 1

    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def total_calls(self) -> int:
        return sum(self.calls.values())

    def reset(self) -> None:
        self.elements.clear()
        self.bytes.clear()
        self.calls.clear()

    def copy(self) -> Traffic:
        copied = Traffic()
        copied.add(self)
        return copied

    def since(self, before: Traffic) -> Traffic:
        """What was counted after `before` was copied from this."""
        counted = self.copy()
        counted.add(before, -1)
        return counted

    def add(self, other: Traffic, times: int = 1) -> None:
        """Count what `other` holds, `times` times over."""
        for mine, theirs in ((self.elements, other.elements), (self.bytes, other.bytes), (self.calls, other.calls)):
            for name, n in theirs.items():
                mine[name] += times * n
