"""One training step of target attention over a sharded table, four ways, on any number of ranks (one included).

    python examples/benchmarks/owner_step.py --lengths 4096 16384                     # one GPU
    torchrun --nproc-per-node 8 examples/benchmarks/owner_step.py                     # several: weak scaling over 1, 2, 4, 8
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/benchmarks/owner_step.py --batch 2 --lengths 64 --vocab 500 --dim 16

Ways, forward and backward of the same batch, plan included:
  dense   every occurrence's embedding moves to the reader, which projects it and calls scaled_dot_product_attention
  unique  distinct embeddings move, attention in unique space (strategy "gather")
  owner   keys stay, queries and partial results move (strategy "owner")
  captured  the same with bounds on its sizes, an eighth above what the fullest rank's batch holds; on a GPU replayed from a CUDA graph by
          `CapturedStep`. Its peak memory is that of warm-up and capture: a graph holds it as long as it lives
Gradients of embeddings end as (row, gradient) pairs at their owners, for `dense` one per occurrence: their sum is left out.
The floor of `owner` has three parts, all measured in the same run. Bytes over the bandwidth of a copy: tokens read and their inverse
written once, each needed row read once forward and once backward, each distinct row's gradient written. Sort: CUB's SortPairs of the
batch's (sample, id) keys with only the bits needed, from `--cub` (cub_sort.cu compiled as a shared library). Wire: the collectives of a
captured step alone, back to back in a CUDA graph of their own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import CubSort, Table, conditions, copy_bandwidth, median_ms, zipf_tokens
from torch import Tensor, nn

from ta_plugin import CapturedStep, SSPGroup, TokenizedAttention, UniqueSpace
from ta_plugin.parallel import create_ssp_group
from ta_plugin.parallel.collectives import gather_single
from ta_plugin.parallel.traffic import Traffic
from ta_plugin.routing import PermutedRows, Route

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of the largest output; float32 products may run on tf32 units


class Rows(nn.Module):
    """This rank's rows of a random (V, D) table; backward leaves (row, gradient) pairs, as ShardedTokenEmbedding does."""

    def __init__(self, vocab: int, dim: int, group: SSPGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab_size, self.embedding_dim, self.owners = vocab, dim, PermutedRows(vocab, group.size)
        self.rank = group.rank
        first, last = self.owners.shard(group.rank)
        generator = torch.Generator(group.device).manual_seed(0)
        whole = torch.randn(vocab, dim, device=group.device, dtype=dtype, generator=generator) * dim**-0.5
        self.rows = whole[first:last].clone()
        self.recorded: list[tuple[Tensor, Tensor]] = []

    def owner_of(self, ids: Tensor) -> Tensor:
        return self.owners.owner_of(ids)

    def in_place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rows, self.owners.local_row(ids, self.rank, other=0)

    def record(self, rows: Tensor, grad: Tensor) -> None:
        self.recorded.append((rows, grad))

    def forward(self, ids: Tensor) -> Tensor:
        return _Look.apply(torch.empty(0, device=ids.device, requires_grad=True), self.in_place(ids)[1], self)


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, table: Rows) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows)
        return table.rows.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.table.record(ctx.saved_tensors[0], grad)
        return grad.new_empty(0), None, None


class Dense(nn.Module):
    """Attention over positions: a row of its own for every occurrence."""

    def __init__(self, table: Rows, group: SSPGroup, maps: dict[str, nn.Module], heads: int) -> None:
        super().__init__()
        self.table, self.group, self.heads, self.maps = table, group, heads, nn.ModuleDict(maps)

    def fetch(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.table(ids.flatten()).view(*ids.shape, -1)
        flat = ids.flatten()
        bounds = torch.tensor([0, flat.numel()], dtype=torch.int32, device=ids.device)
        route = Route.build(self.table.owner_of(flat), bounds, [1] * self.group.size, self.group)
        rows = self.table(route.to_owners(flat, "dense.ids"))
        return route.to_readers(rows, "dense.rows").view(*ids.shape, -1)

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        history, asked = self.fetch(tokens), self.fetch(targets)
        q, k, v = (
            self.maps[name](rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, rows in (("query", asked), ("key", history), ("value", history))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def build(
    args: argparse.Namespace, group: SSPGroup, length: int, dtype: torch.dtype, space: UniqueSpace | None = None
) -> dict[str, nn.Module]:
    """The ways by name; a batch's space gives the bounds of `captured`."""
    table = Rows(args.vocab, args.dim, group, dtype)
    torch.manual_seed(0)
    maps: dict[str, nn.Module] = {
        name: nn.Linear(args.dim, args.dim, bias=False, device=group.device, dtype=dtype)
        for name in ("query", "key", "value")
    }
    ways: dict[str, nn.Module] = {"dense": Dense(table, group, maps, args.heads)}
    options = {"group": group, "num_heads": args.heads, **maps}
    for name, strategy in (("unique", "gather"), ("owner", "owner")):
        ways[name] = TokenizedAttention(args.batch, length, group.size, table, strategy=strategy, **options)
    if space is not None:
        found = torch.tensor([space.num_rows, space.tokens.unique().numel()], device=group.device)
        if group.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group.group)
        rows, ids = (n + n // 8 for n in found.tolist())
        ways["captured"] = TokenizedAttention(
            args.batch, length, group.size, table, strategy="owner", row_bound=rows, id_bound=ids, **options
        )
    return ways


def step(model: nn.Module, table: Rows, tokens: Tensor, lengths: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; the gradients are dropped as an optimizer would after using them."""
    out = model(tokens, lengths, targets=targets)
    out.backward(grad)
    for parameter in model.parameters():
        parameter.grad = None
    table.recorded.clear()
    return out.detach()


class Memory:
    """What is allocated on a GPU at its highest, beyond what was when this was made; 0 on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.held = device.type == "cuda", 0
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.held if self.on_gpu else 0


def device_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of kernels and copies in one call: what is left of a step when its launches cost nothing. 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3


class Recorded(Traffic):
    """Traffic that remembers what each collective sent: shape and dtype of its payload, and how many of its rows left the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.payloads: list[tuple[torch.Size, torch.dtype, int]] = []

    def record(self, name: str, payload: Tensor, rows_sent: int) -> None:
        super().record(name, payload, rows_sent)
        if name != "header":  # which a captured step does not exchange
            self.payloads.append((payload.shape, payload.dtype, rows_sent))

    def again(self, group: SSPGroup) -> Callable[[], Any]:
        """The same collectives alone, back to back; all of them in equal parts, as those of bounded steps are."""

        def one(shape: torch.Size, dtype: torch.dtype, rows_sent: int) -> Callable[[], Any]:
            sent = torch.zeros(shape, dtype=dtype, device=group.device)
            if rows_sent < shape[0]:
                received = torch.empty_like(sent)
                return lambda: dist.all_to_all_single(received, sent, group=group.group)
            gathered = sent.new_empty(group.size * shape[0], *shape[1:])
            return lambda: gather_single(gathered, sent, group.group)

        calls = [one(*payload) for payload in self.payloads]
        return lambda: [call() for call in calls]


def recorded(run: Callable[[], Any], group: SSPGroup) -> Recorded:
    """What `run` sends."""
    traffic, group.traffic = group.traffic, Recorded()
    run()
    found, group.traffic = group.traffic, traffic
    return found


def sort_and_wire_ms(
    args: argparse.Namespace, group: SSPGroup, tokens: Tensor, run: Callable[[], Any], meet: Callable[[], Any] | None
) -> tuple[float | None, float]:
    """Of the floor. run: a captured step, eager. No sort without `--cub`."""
    device, works = tokens.device, {}
    if args.cub and device.type == "cuda":
        bits, samples = (args.vocab - 1).bit_length(), torch.arange(tokens.shape[0], device=device)
        keys = tokens + (samples[:, None] << bits)
        works["sort"] = CapturedStep(CubSort(args.cub).work(keys, bits + (tokens.shape[0] - 1).bit_length()), [], [])
    if group.size > 1:
        works["wire"] = CapturedStep(recorded(run, group).again(group), [], [])
    ms = median_ms(works, args.rounds, device, meet)
    return ms.get("sort"), ms.get("wire", 0.0)


def measure(
    args: argparse.Namespace, group: SSPGroup, length: int, rate: float, table_of_ways: Table
) -> dict[str, float]:
    """One row per way; milliseconds of each."""
    device, dtype = group.device, getattr(torch, args.dtype)
    tokens = zipf_tokens(args.batch, length, args.vocab, args.alpha, device, seed=group.rank)
    lengths = torch.full((args.batch,), length, device=device)
    space = UniqueSpace.from_padded(tokens, lengths)
    ways = build(args, group, length, dtype, space)
    table = ways["owner"].embedding_fn
    assert isinstance(table, Rows)
    targets = zipf_tokens(args.batch, args.targets, args.vocab, args.alpha, device, seed=1000 + group.rank)
    grad = torch.randn(args.batch, args.targets, args.dim, device=device).to(dtype)

    inputs = [tokens, lengths, targets, grad]
    runs: dict[str, Callable[[], Tensor]] = {
        name: partial(step, model, table, *inputs) for name, model in ways.items() if name != "captured"
    }
    memory = Memory(device)
    runs["captured"] = partial(
        CapturedStep(partial(step, ways["captured"], table), [ways["captured"]], inputs), *inputs
    )
    peak = {"captured": memory.peak()}
    outs, sent, calls, busy = {}, {}, {}, {}
    for name, run in runs.items():
        outs[name] = run().clone()
        group.traffic.reset()
        memory = Memory(device)
        run()
        peak.setdefault(name, memory.peak())
        sent[name], calls[name] = group.traffic.total_bytes(), group.traffic.total_calls()
        busy[name] = device_ms(run, device)
    ways["captured"].check_bounds()
    largest = outs["dense"].abs().max()
    for name, out in outs.items():
        error = float((out - outs["dense"]).abs().max() / largest)
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name} differs from dense by {error:.1e} of the largest output")

    meet = partial(dist.barrier, group.group) if group.size > 1 else None
    times = median_ms(runs, args.rounds, device, meet)
    ids, row = int(space.tokens.unique().numel()), args.dim * dtype.itemsize
    moved = 1e3 * (tokens.numel() * 16 + 2 * space.num_rows * row + ids * row) / rate
    sort, wire = sort_and_wire_ms(args, group, tokens, partial(step, ways["captured"], table, *inputs), meet)
    floors = [moved, None if sort is None else moved + sort + wire]
    parts = f"{moved:.2f} + {'no --cub' if sort is None else f'{sort:.2f}'} + {wire:.2f}"
    for name in ways:
        held = f"{peak[name] / 2**20:.0f} MiB ({peak[name] / max(peak['dense'], 1):.2f})" if peak[name] else "-"
        bound = name in ("owner", "captured")
        against = [f"{times[name] / floor:.1f}" if floor and bound else "" for floor in floors]
        speed = [
            f"{x:.2f}" for x in (times[name], busy[name], times["dense"] / times[name], times["unique"] / times[name])
        ]
        sends = [calls[name], f"{sent[name] / 2**20:.4g}"]
        table_of_ways.row(group.size, length, name, *speed, parts if bound else "", *against, *sends, held)
    return times


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The arguments that size a step."""
    parser.add_argument("--batch", type=int, default=256, help="samples per rank")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--vocab", type=int, default=4_000_000)
    parser.add_argument("--alpha", type=float, default=1.05)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def start() -> tuple[torch.device, int, bool]:
    """Join the process group that torchrun describes, if it does: this rank's device, the number of ranks, whether it is the first."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        mine = torch.device("cuda", torch.cuda.current_device()) if cuda else None
        dist.init_process_group("nccl" if cuda else "gloo", device_id=mine)
    world = dist.get_world_size() if dist.is_initialized() else 1
    first = not dist.is_initialized() or dist.get_rank() == 0
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), world, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cub", help="cub_sort.cu, compiled as a shared library")
    args = parser.parse_args()
    device, world, first = start()

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    rate = copy_bandwidth(device)
    per_rank = f"per rank B={args.batch} D={args.dim} H={args.heads} T={args.targets} {args.dtype}"
    say(conditions(device, f"copy {rate / 1e12:.3f} TB/s", f"{per_rank}, Zipf {args.alpha} over {args.vocab} ids"))
    columns = ["ranks", "L", "way", "ms", "GPU busy, ms", "dense over it", "unique over it"]
    columns += ["floor: bytes + sort + wire, ms", "over bytes", "over bytes, sort and wire"]
    columns += ["collectives", "sent per rank, MiB", "peak memory (of dense)"]
    table = Table(columns, say)
    sizes = [n for n in (2**i for i in range(world.bit_length())) if world % n == 0]
    scaling: dict[int, dict[int, dict[str, float]]] = {}
    for size in sorted({*sizes, world}):
        group = create_ssp_group(size, device=device)
        scaling[size] = {length: measure(args, group, length, rate, table) for length in args.lengths}
    say("")
    for size, by_length in scaling.items():
        if size > 1:  # the batch per rank stays: the same time would be perfect
            for length, times in by_length.items():
                shares = ", ".join(f"{name} {scaling[1][length][name] / ms:.0%}" for name, ms in times.items())
                say(f"weak scaling, {size} ranks, L={length}: {shares}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
