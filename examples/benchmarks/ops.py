"""The operators of csrc/ on one GPU: time, fraction of the floor, and torch's own ways as peers.

The floor of an operator is the bytes it must move (each input read once, each output written once) over the bandwidth of a
device-to-device copy measured in the same run; of the plan also CUB's SortPairs of the same (sample, id) keys, with only the bits needed.
What can be captured runs as a CUDA graph, so that the host's launches are not timed; what is shorter than a graph's own launch many times
over in one graph. torch.unique reads the device and cannot be captured. Medians; every operator alternates between two inputs. CUB's sort
is compiled with nvcc on the fly, or given by --cub (cub_sort.cu beside this file).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import CubSort, Table, compiled_cub_sort, conditions, copy_bandwidth
from torch import Tensor

from ta_plugin import CapturedStep, UniqueSpace
from ta_plugin.ops import Segments, expand, load_op, merge_partials, operators, segment_logsumexp, segment_sum
from ta_plugin.routing import PermutedRows

Work = Callable[[], object]
ID_BITS, DIM, RANKS = 22, 128, 8  # 4M ids
LONG = 300  # us, beside which a graph's launch is nothing


def zipf(samples: int, length: int, alpha: float, seed: int) -> Tensor:
    """(samples, length) ids in [0, 2**22), rank r with probability ~ r**-alpha, ranks shuffled over the ids."""
    g = torch.Generator("cuda").manual_seed(seed)
    weights = torch.arange(1, 2**ID_BITS + 1, device="cuda", dtype=torch.float64) ** -alpha
    cdf = weights.cumsum(0) / weights.sum()
    draws = torch.rand(samples * length, device="cuda", generator=g, dtype=torch.float64)
    ranks = torch.searchsorted(cdf, draws).clamp(max=2**ID_BITS - 1)
    shuffle = torch.randperm(2**ID_BITS, device="cuda", generator=g)
    return shuffle[ranks].view(samples, length)


def microseconds(works: list[Work], graph: bool = True, rounds: int = 15) -> float:
    """Median time of one call, the works taking turns, each behind another so that the queue is never empty."""
    if not graph:
        return _median(works, rounds)
    time = _median([CapturedStep(work, [], []) for work in works], rounds)
    times = int(LONG // time)
    if times <= 1:
        return time

    def many() -> None:
        for _ in range(times):
            for work in works:
                work()

    return _median([CapturedStep(many, [], [])], rounds) / (times * len(works))


def _median(works: list[Work], rounds: int) -> float:
    for work in works * 2:
        work()
    torch.cuda.synchronize()
    times = []
    for i in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        works[(i + 1) % len(works)]()
        begin.record()
        works[i % len(works)]()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


class Operators:
    """The table, and the bandwidth, bytes per microsecond, that its floors divide by."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        self.table = Table(["case", "operator", "us", "floor us (bytes)", "of floor", "against (ours over it)"])

    def row(self, case: str, name: str, time: float, moved: int, **peers: float) -> None:
        floor = moved / self.bandwidth
        against = "; ".join(f"{peer.replace('_', ' ')} {t:.0f} us ({time / t:.2f})" for peer, t in peers.items())
        self.table.row(case, name, f"{time:.0f}", f"{floor:.0f}", f"{floor / time:.2f}", against)


def plan(table: Operators, cub: CubSort, case: str, inputs: list[Tensor]) -> None:
    op = torch.ops.ta_plugin
    samples, length = inputs[0].shape
    slots = samples * length
    full = torch.full((samples,), length, device="cuda")
    sample_bits = (samples - 1).bit_length()
    base = torch.arange(samples, device="cuda")[:, None] << ID_BITS
    keys = [x | base for x in inputs]
    spaces = [UniqueSpace.from_padded(x, full) for x in inputs]
    rows = spaces[0].num_rows
    case += f" (L/U {slots / rows:.2f})"
    sort = microseconds([cub.work(x, ID_BITS + sample_bits) for x in keys])
    unique = microseconds(
        [lambda x=x: torch.unique(x, return_inverse=True, return_counts=True) for x in keys], graph=False, rounds=5
    )
    moved = 8 * (3 * slots + 2 * rows)  # tokens, inverse and slots; distinct tokens and counts
    for name, grouped, more in (("", False, 0), (", grouped", True, 8 * (slots + rows))):
        ours = microseconds([lambda x=x, g=grouped: op.unique(x, full, -1, g) for x in inputs])
        table.row(case, f"unique{name}, a block per sample", ours, moved + more, CUB=sort, torch_unique=unique)
    bounds = torch.tensor([0, slots], device="cuda")
    sort = microseconds([cub.work(x, ID_BITS) for x in inputs])
    unique = microseconds(
        [lambda x=x: torch.unique(x, return_inverse=True, return_counts=True) for x in inputs], graph=False, rounds=5
    )
    flat = [x.reshape(-1) for x in inputs]
    whole = [UniqueSpace.from_packed(x) for x in flat]
    rows_of_all = whole[0].num_rows
    moved = 8 * (2 * slots + 2 * rows_of_all)
    for name, grouped, more in (("", False, 0), (", grouped", True, 8 * (slots + rows_of_all))):
        ours = microseconds([lambda x=x, g=grouped: op.unique(x, bounds, -1, g) for x in flat])
        table.row(case, f"unique{name}, one sample", ours, moved + more, CUB=sort, torch_unique=unique)
    ours = microseconds([lambda s=s: op.group(s.inverse, s.counts) for s in whole])
    table.row(case, "grouped afterwards, one sample", ours, 8 * (2 * slots + 2 * rows_of_all))

    owners = PermutedRows(2**ID_BITS, RANKS)
    ours = microseconds([lambda s=s: owners.owner_of(s.tokens) for s in spaces])
    table.row(case, "owners", ours, 16 * rows)
    owned = [owners.owner_of(s.tokens) for s in spaces]
    long = [s.cu_seqlens.long() for s in spaces]
    ours = microseconds([lambda o=o, b=b: op.partition(o, b, RANKS) for o, b in zip(owned, long, strict=True)])
    sort = microseconds([cub.work(o, 3) for o in owned])
    argsort = microseconds([lambda o=o: o.argsort(stable=True) for o in owned])
    table.row(case, "partition", ours, 16 * rows, CUB=sort, torch_argsort=argsort)
    folds(table, case, [s.segments for s in spaces])


def folds(table: Operators, case: str, segments: list[Segments], index_backward: bool = True) -> None:
    members, rows = segments[0].num_members, segments[0].num_segments
    values = [torch.randn(members, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(1)]
    values = values * len(segments)
    pairs = list(zip(values, segments, strict=True))
    row_bytes = 2 * DIM
    table_rows = [torch.randn(s.num_segments, DIM, device="cuda", dtype=torch.bfloat16) for s in segments]
    spread = list(zip(table_rows, segments, strict=True))
    ours = microseconds([lambda v=v, s=s: segment_sum(v, s) for v, s in pairs])
    peers = {
        "index_add": microseconds(
            [lambda v=v, r=r, s=s: r.index_add(0, s.index, v) for v, (r, s) in zip(values, spread, strict=True)],
            rounds=5,
        )
    }
    if index_backward:
        peers["index_backward"] = microseconds(
            [
                lambda v=v, r=r, s=s: torch.zeros_like(r).index_put_((s.index,), v, accumulate=True)
                for v, (r, s) in zip(values, spread, strict=True)
            ],
            graph=False,
            rounds=3,
        )
    table.row(case, "segment_sum bf16", ours, row_bytes * (members + rows) + 8 * (members + rows), **peers)
    ours = microseconds([lambda r=r, s=s: expand(r, s) for r, s in spread])
    peer = microseconds([lambda r=r, s=s: r.index_select(0, s.index) for r, s in spread])
    table.row(case, "expand bf16", ours, row_bytes * (members + rows) + 8 * members, index_select=peer)
    biases = torch.randn(members, 4, device="cuda")
    ours = microseconds([lambda s=s: segment_logsumexp(biases, s) for s in segments])
    table.row(case, "segment_logsumexp fp32, 4 heads", ours, 16 * (members + rows) + 8 * (members + rows))


def merging(table: Operators, dtype: torch.dtype) -> None:
    inputs = [torch.randn(RANKS, 16384, 4, DIM, device="cuda", dtype=dtype) for _ in range(2)]
    lses, into = torch.randn(RANKS, 16384, 4, device="cuda"), torch.bfloat16
    case = f"{RANKS} x 16384 x 4 x {DIM}, {str(dtype)[6:]} to bfloat16"
    plain = load_op("merge", compile=False)
    ours = microseconds([lambda x=x: merge_partials(x, lses, into) for x in inputs])
    peer = microseconds([lambda x=x: plain(x, lses, into) for x in inputs])
    out, lse = merge_partials(inputs[0], lses, into)
    read = inputs[0].nbytes + lses.nbytes
    table.row(case, "merge", ours, read + out.nbytes + lse.nbytes, torch=peer)
    backward, plain_backward = torch.ops.ta_plugin.merge_backward, load_op("merge_backward", compile=False)
    ours = microseconds([lambda x=x: backward(out, lse, x, lses, lse) for x in inputs])
    peer = microseconds([lambda x=x: plain_backward(out, lse, x, lses, lse) for x in inputs])
    table.row(case, "merge backward", ours, 2 * read + out.nbytes + 2 * lse.nbytes, torch=peer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cub", help="cub_sort.cu, compiled as a shared library")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    for name in operators():
        op = load_op(name, device="cuda")
        assert op.implementation == "compiled", op.reason
    device = torch.device("cuda")
    rate = copy_bandwidth(device)
    facts = [f"copy {rate / 1e12:.2f} TB/s", f"{options.samples} samples, D={DIM}, Zipf 1.05 over {2**ID_BITS} ids"]
    print(conditions(device, *facts))
    table, cub = Operators(rate / 1e6), CubSort(options.cub or compiled_cub_sort())
    with torch.no_grad():
        for length in options.lengths:
            inputs = [zipf(options.samples, length, 1.05, seed) for seed in range(2)]
            plan(table, cub, f"{options.samples} x {length}, Zipf", inputs)
        hot = torch.full((options.samples, options.lengths[0]), 5, device="cuda")
        plan(table, cub, f"{options.samples} x {options.lengths[0]}, one token", [hot, hot.clone()])
        one = torch.zeros(2**20, dtype=torch.int64, device="cuda")
        folds(table, "1M members, one row", [Segments.from_index(one, 1)] * 2)
        for dtype in (torch.bfloat16, torch.float32):
            merging(table, dtype)


if __name__ == "__main__":
    main()
