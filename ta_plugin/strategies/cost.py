"""The cost model that chooses a strategy: bytes sent, operations and memory, from sizes every rank knows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StrategyName = Literal["gather", "owner", "ring", "positions"]
Layout = Literal["sample", "sequence"]


@dataclass(frozen=True)
class Rates:
    """What a rank moves and computes per second; only their ratio decides.

    hop_seconds: what one more block of keys costs beside its work: a message, kernel launches, a partial result to merge
    """

    bytes_per_second: float
    flops_per_second: float
    hop_seconds: float = 1e-4

    @classmethod
    def of(cls, device: torch.device) -> Rates:
        """Order-of-magnitude defaults: an inter-node link beside a GPU's matrix units, or loopback beside a CPU core."""
        return cls(5e10, 2e14) if device.type == "cuda" else cls(1e9, 3e10)


@dataclass(frozen=True)
class Workload:
    """Sizes of one batch, averaged over ranks.

    ranks N; samples B; per rank: occurrences M, rows U (distinct per sample), ids I (distinct per rank), queries Q (U for
    self-attention). pairs: query-row products, summed over samples; position_pairs: query-occurrence products, with every
    position a query in self-attention. embed_dim E, heads H, kv_heads Hk, head_dim D; element_size in bytes. id_shares: the sum
    over ids of the squared share of rows each accounts for, for `imbalance`. In layout "sequence", where all ranks read
    chunks of the same samples, owned is the number of rows a rank owns, and pairs are of owned rows (or a chunk's positions) with
    the whole samples.
    """

    ranks: int
    samples: int
    occurrences: float
    rows: float
    ids: float
    queries: float
    pairs: float
    position_pairs: float
    targets: bool
    embed_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    element_size: int = 4
    id_shares: float = 0.0
    layout: Layout = "sample"
    owned: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Per rank and step: bytes sent forward (backward sends about as many), operations forward, bytes held, seconds forward."""

    strategy: StrategyName
    bytes_sent: float
    flops: float
    memory: float
    seconds: float


def estimate(strategy: StrategyName, load: Workload, rates: Rates) -> Estimate:
    """What one forward of `strategy` costs a rank."""
    if load.layout == "sequence" and not load.targets:
        return _estimate_shared(strategy, load, rates)
    away = (load.ranks - 1) / load.ranks
    row = load.embed_dim * load.element_size
    head_width = load.heads * load.head_dim
    project = 4 * load.embed_dim * load.kv_heads * load.head_dim  # key and value of one row
    query = 2 * load.embed_dim * head_width * load.queries
    position_level = strategy == "positions"
    targets = load.queries if load.targets else 0.0
    fetched = load.occurrences if position_level else load.ids
    pairs = load.position_pairs if position_level else load.pairs
    attend = 4 * pairs * head_width
    if strategy == "owner":
        returned = (load.ranks - 1) * load.queries * (2 * head_width + load.heads) * load.element_size
        bytes_sent = away * (load.rows * 12 + targets * (8 + row)) + returned
        held = load.rows * (row + 12) + load.ranks * load.queries * (2 * head_width + load.heads) * load.element_size
        flops = query + load.ids * project + attend * imbalance(load)
    else:
        bytes_sent = away * (fetched + targets) * (8 + row)
        rows = load.occurrences if position_level else load.rows
        held = rows * (row + 2 * load.kv_heads * load.head_dim * load.element_size)
        width = load.occurrences if not load.targets and position_level else load.queries
        flops = 2 * load.embed_dim * head_width * width + fetched * project + attend
    seconds = bytes_sent / rates.bytes_per_second + flops / rates.flops_per_second
    return Estimate(strategy, bytes_sent, flops, held, seconds)


def _estimate_shared(strategy: StrategyName, load: Workload, rates: Rates) -> Estimate:
    """Self-attention of samples whose chunks lie on all ranks: ring on owned rows, or ring attention over positions."""
    positions = strategy == "positions"
    away, size = (load.ranks - 1) / load.ranks, load.element_size
    head_width, kv_width = load.heads * load.head_dim, 2 * load.kv_heads * load.head_dim
    local, fetched = (load.occurrences,) * 2 if positions else (load.owned, load.rows)
    project = 2 * load.embed_dim * (head_width + kv_width) * (local if positions else load.ids)
    attend = 4 * (load.position_pairs if positions else load.pairs) * head_width
    attend *= 1.0 if positions else imbalance(load)
    hops = (load.ranks - 1) * local * kv_width * size
    # positions: ids out and embeddings back; rows: ids and counts out, counts to all, results back
    once = away * fetched * (8 + load.embed_dim * size if positions else 16 + head_width * size)
    once += 0 if positions else (load.ranks - 1) * load.owned * 8
    held = local * (load.embed_dim + head_width) * size + load.ranks * local * (kv_width + head_width) * size
    moving, computing = hops / rates.bytes_per_second, attend / rates.flops_per_second
    many = circulates(load.ranks * local * kv_width * size, attend, load.ranks, rates)
    pass_over = max(moving, computing) + (load.ranks - 1) * rates.hop_seconds if many else moving + computing
    seconds = once / rates.bytes_per_second + project / rates.flops_per_second + pass_over
    return Estimate(strategy, once + hops, project + attend, held, seconds)


def circulates(key_bytes: float, flops: float, ranks: int, rates: Rates) -> bool:
    """Whether keys and values of `key_bytes`, all ranks together, should go round in a ring rather than be gathered at once.

    The ring hides the smaller of moving and computing behind the larger, and pays for a block more per hop.
    flops: of one rank's attention onto all of them
    """
    moving = key_bytes * (ranks - 1) / ranks / rates.bytes_per_second
    return min(moving, flops / rates.flops_per_second) > (ranks - 1) * rates.hop_seconds


def imbalance(load: Workload) -> float:
    """Expected load of the busiest owner over the mean, hashing ids that carry unequal numbers of rows.

    The load of one owner has variance id_shares * (1 - 1/N) / N around the mean 1/N; of N of them the largest lies about
    sqrt(2 ln N) deviations above.
    """
    n = load.ranks
    if n == 1:
        return 1.0
    return 1.0 + math.sqrt(2 * math.log(n) * load.id_shares * (n - 1))


def id_shares(tokens: Tensor) -> float:
    """Sum of squared shares of each id among the rows of a batch, tokens (U,) int64: `Workload.id_shares`."""
    if tokens.numel() == 0:
        return 0.0
    counts = tokens.unique(return_counts=True)[1].double()
    return float(counts.square().sum() / counts.sum().square())


@dataclass(frozen=True)
class Explanation:
    """What a batch costs under each strategy, which is taken and why. `str()` gives a table."""

    load: Workload
    estimates: list[Estimate]
    chosen: StrategyName
    reason: str
    backend: str
    rates: Rates

    def __str__(self) -> str:
        load = self.load
        lines = [
            f"{load.ranks} rank(s), {load.samples} samples each: {load.occurrences:.0f} occurrences, {load.rows:.0f} distinct "
            f"rows (L/U {load.occurrences / max(load.rows, 1):.2f}), {load.ids:.0f} distinct ids, {load.queries:.0f} queries",
            "per rank, forward            sent (MB)   operations (G)   memory (MB)   est. ms",
        ]
        for e in self.estimates:
            name = "plain, over positions" if e.strategy == "positions" else e.strategy
            mark = "->" if e.strategy == self.chosen else "  "
            figures = (
                f"{e.bytes_sent / 1e6:>10.3f} {e.flops / 1e9:>16.4f} {e.memory / 1e6:>13.3f} {1e3 * e.seconds:>9.3f}"
            )
            lines.append(f"{mark} {name:<24} {figures}")
        moved, computed = self.rates.bytes_per_second / 1e9, self.rates.flops_per_second / 1e9
        lines.append(
            f"est. ms: {moved:g} GB/s and {computed:g} G operations/s (`rates`), nothing for calls and waits: compare, don't plan"
        )
        lines.append(f"busiest owner over mean: {imbalance(load):.2f} expected")
        lines.append(f"strategy: {self.chosen} ({self.reason})")
        lines.append(f"backend: {self.backend}")
        return "\n".join(lines)


def explain(load: Workload, rates: Rates, requested: str, backend: str, only_gather: str | None) -> Explanation:
    """Estimates of every strategy next to plain attention, with the choice `choose_strategy` makes."""
    names: list[StrategyName] = ["positions", "gather"] if only_gather else ["positions", "gather", "owner"]
    if load.layout == "sequence":
        names = ["owner"] if load.targets else ["positions", "ring"]
    chosen, reason = choose_strategy(load, rates, requested, only_gather)
    return Explanation(load, [estimate(name, load, rates) for name in names], chosen, reason, backend, rates)


def choose_strategy(load: Workload, rates: Rates, requested: str, only_gather: str | None) -> tuple[StrategyName, str]:
    """The strategy for a batch and the reason. `only_gather` says why owner cannot serve it, or is None."""
    if load.layout == "sequence":
        return _choose_shared(load, requested)
    if requested == "ring":
        raise ValueError("strategy is 'ring', but layout is 'sample'; pass layout='sequence', or strategy='auto'")
    if requested == "owner" and only_gather:
        raise ValueError(f"strategy is 'owner', but {only_gather}; pass strategy='gather' or 'auto'")
    if requested in ("gather", "owner", "positions"):
        return requested, "as requested"  # type: ignore[return-value]
    if only_gather:
        return "gather", only_gather
    if load.ranks == 1:
        return "gather", "one rank owns every token"
    fetch, stay = estimate("gather", load, rates), estimate("owner", load, rates)
    cheaper: StrategyName = "owner" if stay.seconds < fetch.seconds else "gather"
    return cheaper, f"owner is estimated at {stay.seconds / max(fetch.seconds, 1e-12):.2f} of gather's time"


def _choose_shared(load: Workload, requested: str) -> tuple[StrategyName, str]:
    """In layout "sequence" no rank holds a whole sample, so keys circulate, or queries do."""
    able: StrategyName = "owner" if load.targets else "ring"
    what = "targets go to the owners of the history" if load.targets else "self-attention runs on owned rows"
    if requested not in ("auto", able):
        raise ValueError(
            f"strategy is {requested!r}, but in layout 'sequence' {what}; pass strategy={able!r} or 'auto'"
        )
    return able, "as requested" if requested == able else what
