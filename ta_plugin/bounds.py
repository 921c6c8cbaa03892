"""Sizes that the caller bounds, so that none of them visits the host: what a step inside a CUDA graph needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ta_plugin.beside import Beside
from ta_plugin.bounded_space import BoundedSpace
from ta_plugin.parallel import SSPGroup, exchange_header
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
    """Bounds on the sizes of a batch, and what its calls found against them, on the device until `check` reads it.

    rows:  how many distinct tokens the samples of a rank's batch hold at most, added up over the samples
    ids:   how many distinct ids a rank looks up at most, for the tokens of a batch or for its targets
    route: how many of its rows a rank sends to one owner at most, on several ranks; by default `default_route`

    spare_id: an id that this rank owns, in place of one that is wrong, or where a batch has none; to be set before the first call

    A call builds its spaces here and ends with `wrong`.

    beside: branches that last until the end of a step, while a `CapturedStep` captures it
    """

    def __init__(
        self,
        rows: int,
        ids: int | None = None,
        vocab_size: int | None = None,
        *,
        route: int | None = None,
        ranks: int = 1,
    ) -> None:
        self.rows, self.ids, self.vocab_size = rows, rows if ids is None else ids, vocab_size
        self.route = default_route(rows, ranks) if route is None else route
        self.spare_id: int | None = None
        for name, bound in (("row_bound", self.rows), ("id_bound", self.ids), ("route_bound", self.route)):
            if not 1 <= bound < 2**31:
                raise ValueError(f"{name} is {bound}; pass 1 or more, below 2**31")
        if ranks * self.route >= 2**31:
            raise ValueError(f"route_bound is {self.route} on {ranks} ranks; a rank receives fewer than 2**31 rows")
        self.beside: Beside | None = None
        self._noted: list[tuple[Tensor, list[_Interval]]] = []
        self._seen: dict[tuple[_Interval, ...], _Seen] = {}
        self._wrong: Tensor | None = None
        self._agreed: set[tuple[int, ...]] = set()

    def exchange_header(self, group: SSPGroup, fields: Sequence[int], error: Exception | None) -> list[list[int]]:
        """`parallel.exchange_header`, and while a graph is captured what it gave for the same call before: nothing visits the host."""
        mine = tuple(fields)
        if group.size > 1 and group.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if error is not None:
                raise error
            if mine not in self._agreed:
                raise ValueError(
                    "ranks have not agreed on the call that is captured; make it once before, outside the graph"
                )
            return [list(mine) for _ in range(group.size)]
        headers = exchange_header(group, mine, error)
        if all(tuple(theirs) == mine for theirs in headers):
            self._agreed.add(mine)
        return headers

    def space(
        self, tokens: Tensor, lengths: Tensor, targets: Tensor | None, grouped: bool | None = None
    ) -> BoundedSpace:
        """The bounded space of a batch; begins a call."""
        space = BoundedSpace.of_padded(tokens, lengths, self.rows, grouped=grouped)
        within = _Interval("lengths", 0, tokens.shape[1], "no sample is longer or shorter than that")
        ids = _Interval("ids", 0, self.last_id, "ids are 0 or larger and below vocab_size")
        assert space.found is not None
        self._noted = [(space.found[1:4], [_held("distinct rows of a batch", "row", self.rows), within, within])]
        self._noted += [(self._ends(x), [ids, ids]) for x in (space.tokens, targets) if x is not None and x.numel()]
        self._noted.append((self._seen_for((self._ids_held,), tokens.device).largest, [self._ids_held]))
        self._wrong = None
        return space

    def _ends(self, ids: Tensor) -> Tensor:
        """The smallest and the largest (2,); in a `CapturedStep` on the branch that `settle` goes on with."""
        with nullcontext() if self.beside is None else self.beside.work("bounds", ids):
            return torch.stack(ids.aminmax())

    def distinct(self, ids: Tensor, end: Tensor | None = None) -> BoundedSpace:
        """The bounded space of ids (n,), of the first `end` (1,) of them, as one sample."""
        bounds = None if end is None else torch.arange(2, device=end.device) * end
        return BoundedSpace.of_packed(ids, bounds, min(self.ids, max(ids.numel(), 1)))

    def held(self, distinct: UniqueSpace, late: Beside | None = None) -> None:
        """Note how many distinct ids there are. late: whose branch "keys" finds them; the call does not wait for it, the next one tells."""
        count = _count_of(distinct)
        if late is None:
            self._noted.append((count, [self._ids_held]))
            return
        with late.work("ids", count, behind=("keys", "bounds")):
            self._seen_for((self._ids_held,), count.device).take(count)
        late.later("ids")

    def owned(self, distinct: UniqueSpace) -> UniqueSpace:
        """`held`, and ids that this rank can look up: in place of those outside the vocabulary, and where there are none, one it owns."""
        self.held(distinct)
        right = (distinct.tokens == self.within(distinct.tokens)) & (_count_of(distinct) > 0)
        return replace(distinct, tokens=torch.where(right, distinct.tokens, self.filler))

    def within(self, ids: Tensor) -> Tensor:
        """Ids as they are, or the nearest of the vocabulary."""
        return ids.clamp(0, self.last_id)

    @property
    def filler(self) -> int:
        """`spare_id`, or 0 where nobody set it: on one rank, which owns every id."""
        return self.spare_id or 0

    @property
    def _ids_held(self) -> _Interval:
        return _held("distinct ids of a batch", "id", self.ids)

    @property
    def last_id(self) -> int:
        """The largest that is right."""
        return _INT64.max - 1 if self.vocab_size is None else self.vocab_size - 1

    def sent(self, most: Tensor) -> None:
        """Note how many rows (1,) go to the owner that gets the most."""
        self._noted.append((most, [_held("rows of a batch for one owner", "route", self.route)]))

    def owners(self, owner: Tensor, ranks: int) -> None:
        """Note owners (n,) that an embedding names, which has none for an id that it does not hold."""
        if owner.numel():
            one = _Interval("owner_of", 0, ranks - 1, "embedding_fn has no owner for such ids: pass ids that it holds")
            self._noted.append((torch.stack(owner.aminmax()), [one, one]))

    def settle(self, beside: Beside) -> None:
        """Find out, on a branch that joins before `wrong`, about what was noted so far, on the branch "targets" or here."""
        if self._noted:
            with beside.work("bounds", *(x for x, _ in self._noted), behind=("targets",)):
                self._take()

    def _take(self) -> None:
        values = torch.cat([value for value, _ in self._noted])
        intervals = tuple(interval for _, each in self._noted for interval in each)
        self._noted = []
        wrong = self._seen_for(intervals, values.device).take(values)
        self._wrong = wrong if self._wrong is None else self._wrong | wrong

    def _seen_for(self, intervals: tuple[_Interval, ...], device: torch.device) -> _Seen:
        # tensors from the host: made before a graph is captured, by the calls that warm up
        if intervals not in self._seen:
            with torch.inference_mode(False):  # later calls, which may train, write to them
                self._seen[intervals] = _Seen.of(intervals, device)
        return self._seen[intervals]

    def hear(self, wrong: Tensor) -> None:
        """What `wrong` gave on every rank (N, 1), where the call's ranks told each other."""
        self._wrong = wrong.any()

    def wrong(self) -> Tensor:
        """Whether something of this call lay outside its bounds, so that its results are not right: a bool on the device."""
        if self._noted:
            self._take()
        assert self._wrong is not None
        return self._wrong

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
        """Whether any lies outside."""
        torch.minimum(self.smallest, values, out=self.smallest)
        torch.maximum(self.largest, values, out=self.largest)
        return ((values < self.low) | (values > self.high)).any()

    def read(self) -> list[list[int]]:
        """(smallest, largest) of each, forgotten then."""
        ends: list[list[int]] = torch.stack([self.smallest, self.largest], 1).tolist()
        for x in (self.smallest, self.largest):
            x.copy_(self.low)
        return ends


def _held(what: str, name: str, bound: int) -> _Interval:
    return _Interval(what, 0, bound, f"pass a larger {name}_bound")


def _count_of(distinct: UniqueSpace) -> Tensor:
    """How many distinct ids there are (1,)."""
    assert isinstance(distinct, BoundedSpace) and distinct.found is not None
    return distinct.found[1:2]


def default_route(rows: int, ranks: int) -> int:
    """A quarter above an even share, which hashing exceeds by far less on up to about 64 ranks, and 64; all rows at most."""
    return min(rows, -(-rows * 5 // (4 * ranks)) + 64)
