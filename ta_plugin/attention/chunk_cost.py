"""The cost model that chooses the chunk size of causal attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ta_plugin.unique_space import UniqueSpace

SIZES = tuple(1 << n for n in range(6, 14))


@dataclass(frozen=True)
class ChunkRates:
    """What a device takes, in seconds: a query-key pair per head and dimension, forward and backward; a prefix weight made and made
    again; a chunk started, and what a decay adds to that (its weights are many small operations); once samples are cut at all, `start` and,
    per position, head and dimension, `move` (keys to their positions, partials merged, gradients folded). `tile`: queries a kernel takes
    together, so that a causal chunk computes half a tile per query for nothing.
    """

    pair: float
    weight: float
    chunk: float
    decay: float
    start: float
    move: float
    tile: int

    @classmethod
    def of(cls, device: torch.device) -> ChunkRates:
        """Order-of-magnitude defaults: 14 operations at a GPU's 4e14 a second beside 3e12 bytes, or a CPU core's 3e10 and 4e9.

        On CUDA the rest is fitted to one H100, 16 heads of 64, text at 131,072 positions in chunks of 256 to 2,048; it then chooses
        within 3 % of the fastest size for text and DNA of 4,096 positions or more, and cuts from about 16,384. There it foretells the
        table of examples/benchmarks/README.md; of shorter samples, left whole, it knows the attention alone.
        """
        if device.type == "cuda":
            return cls(
                pair=14 / 4e14, weight=32 / 3e12, chunk=8e-6, decay=2.5e-4, start=2e-3, move=110 / 3e12, tile=128
            )
        return cls(pair=14 / 3e10, weight=32 / 4e9, chunk=3e-4, decay=1e-4, start=1e-3, move=0.0, tile=32)


@dataclass(frozen=True)
class ChunkChoice:
    """The chosen size and what each size is estimated to cost: before the chunks, inside, weights, and being cut. `str()` gives a table."""

    size: int
    seconds: dict[int, tuple[float, float, float, float]]
    growth: float

    def __str__(self) -> str:
        lines = [
            f"rows grow like length ** {self.growth:.2f}",
            "chunk     before the chunk (ms)   inside (ms)   weights (ms)   cutting (ms)",
        ]
        for size, (before, inside, weights, cutting) in self.seconds.items():
            mark = "->" if size == self.size else "  "
            lines.append(
                f"{mark} {size:>6} {1e3 * before:>19.3f} {1e3 * inside:>13.3f} {1e3 * weights:>14.3f} {1e3 * cutting:>14.3f}"
            )
        return "\n".join(lines)


def choose_chunk(
    space: UniqueSpace,
    heads: int,
    head_dim: int,
    device: torch.device,
    decayed: bool = False,
    rates: ChunkRates | None = None,
) -> ChunkChoice:
    """The chunk size of least estimated time, forward and backward, for `heads` query heads of `head_dim`.

    A sample of L occurrences and U = L ** beta rows has L * U / (1 + beta) pairs before the chunks, L * (chunk + tile) / 2 inside, and
    L / chunk * U / (1 + beta) weights, per head where decayed. A sample of one chunk has nothing before it. The last size compared is
    the longest sample's: nothing is cut, and `causal_attention` is plain attention over positions.
    """
    rates = ChunkRates.of(device) if rates is None else rates
    lengths, rows = ([b - a for a, b in pairwise(bounds)] for bounds in space.host_bounds)
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    whole = 1 if longest is None else max(lengths[longest], 1)
    pair = rates.pair * heads * head_dim
    weight = rates.weight * (heads if decayed else 1)
    seconds = {}
    for size in (*(size for size in SIZES if size < whole), whole):
        before = inside = weights = 0.0
        for length, distinct in zip(lengths, rows, strict=True):
            tiled = min(length, size) + min(rates.tile, length)
            inside += pair * length * tiled / 2
            if length > size:
                chunks, mean = -(-length // size), distinct / (1 + _growth(length, distinct))
                before += pair * length * mean
                weights += chunks * (weight * mean + rates.chunk + (rates.decay if decayed else 0.0))
        cutting = 0.0 if size == whole else rates.start + rates.move * heads * head_dim * space.num_occurrences
        seconds[size] = (before, inside, weights, cutting)
    best = min(seconds, key=lambda size: sum(seconds[size]))
    growth = 1.0 if longest is None else _growth(lengths[longest], rows[longest])
    return ChunkChoice(best, seconds, growth)


def _growth(length: int, distinct: int) -> float:
    """beta of U = L ** beta."""
    return math.log(distinct) / math.log(length) if length > 1 and distinct > 0 else 1.0
