"""Sizes that the caller bounds, so that none of them visits the host: what a step inside a CUDA graph needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ta_plugin.unique_space import UniqueSpace

_INT64 = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class _Interval:
    """Where a number found on the device must lie, both ends included."""

    what: str
    low: int
    high: int
    remedy: str


class Bounds:
    """Bounds on the distinct tokens of a batch, and what its calls found against them, on the device until `check` reads it.

    rows: how many distinct tokens the samples of a batch hold at most, added up over the samples
    ids:  how many distinct ids the tokens of a batch, or its targets, hold at most

    A call builds its spaces here and ends with `settle`.
    """

    def __init__(self, rows: int, ids: int | None = None, vocab_size: int | None = None) -> None:
        self.rows, self.ids, self.vocab_size = rows, rows if ids is None else ids, vocab_size
        for name, bound in (("row_bound", self.rows), ("id_bound", self.ids)):
            if not 1 <= bound < 2**31:
                raise ValueError(f"{name} is {bound}; pass 1 or more, below 2**31")
        self._noted: list[tuple[Tensor, list[_Interval]]] = []
        self._seen: dict[tuple[_Interval, ...], _Seen] = {}

    def space(self, tokens: Tensor, lengths: Tensor) -> UniqueSpace:
        """The bounded space of a batch; begins a call."""
        space = UniqueSpace.from_padded(tokens, lengths, rows=self.rows)
        within = _Interval("lengths", 0, tokens.shape[1], "no sample is longer or shorter than that")
        assert space.found is not None
        self._noted = [(space.found[1:4], [_held("row", self.rows), within, within])]
        return space

    def distinct(self, ids: Tensor, end: Tensor | None = None) -> UniqueSpace:
        """The bounded space of ids (n,), of the first `end` (1,) of them, as one sample.

        Ids outside the vocabulary become others; `check` raises then.
        """
        bounds = None if end is None else torch.cat([torch.zeros_like(end), end])
        space = UniqueSpace.from_packed(ids, bounds, rows=min(self.ids, max(ids.numel(), 1)))
        assert space.found is not None
        high = _INT64.max - 1 if self.vocab_size is None else self.vocab_size - 1
        range_ = _Interval("ids", 0, high, "ids are 0 or larger and below vocab_size")
        ends = torch.stack(space.tokens.aminmax())
        self._noted.append((torch.cat([space.found[1:2], ends]), [_held("id", space.num_rows), range_, range_]))
        return replace(space, tokens=space.tokens.clamp(0, high))

    def settle(self) -> Tensor:
        """Whether everything of this call lay within its bounds, a bool on the device."""
        values = torch.cat([value for value, _ in self._noted])
        intervals = tuple(interval for _, each in self._noted for interval in each)
        self._noted = []
        # tensors from the host: made before a graph is captured, by the calls that warm up
        if intervals not in self._seen:
            self._seen[intervals] = _Seen.of(intervals, values.device)
        return self._seen[intervals].take(values)

    def check(self) -> None:
        """Raise ValueError for what any call since the last check found outside its bounds. Reads the device."""
        wrong = None
        for intervals, seen in self._seen.items():
            for interval, ends in zip(intervals, seen.read(), strict=True):
                for end in ends:
                    if not interval.low <= end <= interval.high:
                        wrong = (
                            wrong
                            or f"{interval.what} reached {end}, outside [{interval.low}, {interval.high}]; {interval.remedy}"
                        )
        if wrong is not None:
            raise ValueError(wrong)


@dataclass(frozen=True)
class _Seen:
    """Intervals and the extremes found so far, (n,) int64 each."""

    low: Tensor
    high: Tensor
    smallest: Tensor
    largest: Tensor

    @classmethod
    def of(cls, intervals: tuple[_Interval, ...], device: torch.device) -> _Seen:
        low, high = (torch.tensor([getattr(x, end) for x in intervals], device=device) for end in ("low", "high"))
        return cls(low, high, low.clone(), low.clone())

    def take(self, values: Tensor) -> Tensor:
        torch.minimum(self.smallest, values, out=self.smallest)
        torch.maximum(self.largest, values, out=self.largest)
        return ((values >= self.low) & (values <= self.high)).all()

    def read(self) -> list[list[int]]:
        """(smallest, largest) of each, forgotten then."""
        ends: list[list[int]] = torch.stack([self.smallest, self.largest], 1).tolist()
        for x in (self.smallest, self.largest):
            x.copy_(self.low)
        return ends


def _held(what: str, bound: int) -> _Interval:
    return _Interval(f"distinct {what}s of a batch", 0, bound, f"pass a larger {what}_bound")
