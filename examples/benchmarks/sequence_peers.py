"""Time and traffic of one attention layer whose sequence lies on several GPUs: distinct rows, DeepSpeed's Ulysses, torch's ring.

    python examples/benchmarks/sequence_peers.py --ranks 2 --lengths 32768 131072 --json peers.json

Starts `--ranks` processes, NCCL with a GPU each, or gloo where there is no GPU. All ways attend over the same text (words of the standard
library's source) with the same keys and values, a function of the token; bidirectional ones have queries that are one too. Ulysses is
deepspeed.sequence.layer.DistributedAttention around `--local` attention, "ring on positions" is torch's context_parallel around
scaled_dot_product_attention. Each is compared with float32 attention at some positions. Bytes are counted at the collectives (SentBytes)
beside their formulas, and at the NVLink counters where the GPU has them; times are medians of forward + backward of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sent_bytes import SentBytes, nvlink_bytes
from sequence_layout import Shape, ring_bytes, standard_library_tokens, start_ranks, ulysses_bytes
from torch import Tensor

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, OwnedRows, causal_over_ranks, pieces_of, ring_attention

SAMPLED = 16  # positions of each rank whose outputs are compared


@dataclass
class Problem:
    """One text on all ranks; every tensor of L rows is whole on every rank and cut by whoever needs a part."""

    tokens: Tensor  # (L,)
    shape: Shape
    causal: bool
    device: torch.device
    dtype: torch.dtype
    group: SSPGroup

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        width = int(self.tokens.max()) + 1
        rows = torch.randn(width, 3, self.shape.heads, self.shape.head_dim, generator=g).to(self.dtype)
        self.table = rows.to(self.device)  # query, key and value of each token
        self.seed = 11

    @property
    def length(self) -> int:
        return self.tokens.numel()

    def places(self) -> Tensor:
        """Positions of this rank: a contiguous chunk, or pieces r and 2 N - 1 - r of 2 N where the work is causal."""
        n, rank = self.group.size, self.group.rank
        everything = torch.arange(self.length, device=self.device)
        if not self.causal:
            return everything.chunk(n)[rank]
        pieces = everything.chunk(2 * n)
        return torch.cat([pieces[rank], pieces[2 * n - 1 - rank]])

    def queries(self, places: Tensor) -> Tensor:
        """(M, H, D): of the token, and under a causal mask of the position too, as a layer above the first has them."""
        q = self.table[self.tokens[places], 0]
        if self.causal:
            angle = places[:, None, None] * torch.linspace(0, 1, self.shape.head_dim, device=self.device)
            q = q * (1 + 0.5 * angle.sin()).to(self.dtype)
        return q

    def keys_values(self, places: Tensor) -> tuple[Tensor, Tensor]:
        return self.table[self.tokens[places], 1], self.table[self.tokens[places], 2]

    def output_gradients(self, count: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(self.seed)
        shape = (count, self.shape.heads, self.shape.head_dim)
        return torch.randn(shape, generator=g, device=self.device).to(self.dtype)

    @torch.no_grad()
    def error(self, out: Tensor, places: Tensor) -> float:
        """Relative distance of out (M, H, D) at some of its places from float32 attention over all positions."""
        some = torch.linspace(0, places.numel() - 1, SAMPLED, device=self.device).long()
        k, v = (x.float() for x in self.keys_values(torch.arange(self.length, device=self.device)))
        expected = []
        for place in places[some]:
            scores = torch.einsum("hd,lhd->hl", self.queries(place[None])[0].float(), k) * self.shape.head_dim**-0.5
            if self.causal:
                scores[:, place + 1 :] = -torch.inf
            expected.append(torch.einsum("hl,lhd->hd", scores.softmax(1), v))
        exact = torch.stack(expected)
        return float((out[some].float() - exact).norm() / exact.norm())


@dataclass
class Way:
    """A layer on this rank: `forward()` gives the outputs; `gradients` are theirs, `places` what they are of (None: not positions)."""

    forward: Callable[[], Tensor]
    gradients: Tensor
    leaves: list[Tensor]
    expected_bytes: int  # of all ranks, forward and backward
    places: Tensor
    to_positions: Callable[[Tensor], Tensor] = field(default=lambda out: out)

    def step(self) -> Tensor:
        for leaf in self.leaves:
            leaf.grad = None
        out = self.forward()
        out.backward(self.gradients)
        return out.detach()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@contextmanager
def distinct_rows(p: Problem, exchange: str) -> Iterator[Way]:
    """Ours, bidirectional: every layer on the distinct rows this rank owns."""
    owned = OwnedRows.of(UniqueSpace.from_packed(p.tokens[p.places()]), HashOwners(p.group.size), p.group)
    leaves = [leaf(x) for x in p.table[owned.space.tokens].unbind(1)]
    rows = sum(owned.rows_of_ranks)
    how: Any = None if exchange == "auto" else exchange
    yield Way(
        lambda: ring_attention(owned, *leaves, exchange=how)[0],
        p.output_gradients(owned.space.num_rows),
        leaves,
        2 * ring_bytes(rows, p.group.size, p.shape, p.table.element_size()),
        p.places(),
        owned.to_positions,
    )


@contextmanager
def causal_rows(p: Problem) -> Iterator[Way]:
    """Ours, causal: a query per position, keys and values of the distinct rows of all ranks."""
    places = p.places()
    pieces = p.tokens[places].view(1, 2, -1)
    reader = pieces_of(pieces, torch.full((1, 2), pieces.shape[2], device=p.device))
    plan = CausalRows.of(reader, HashOwners(p.group.size), p.group)
    q = leaf(p.queries(places))
    k, v = (leaf(x) for x in p.table[plan.owned.space.tokens, 1:].unbind(1))
    rows = sum(plan.owned.rows_of_ranks)
    yield Way(
        lambda: causal_over_ranks(plan, q, k, v)[0],
        p.output_gradients(places.numel()),
        [q, k, v],
        2 * ring_bytes(rows, p.group.size, p.shape, p.table.element_size()),
        places,
    )


@contextmanager
def ulysses(p: Problem, local: str) -> Iterator[Way]:
    """DeepSpeed's: all-to-alls turn chunks of all heads into whole sequences of some heads, and back."""
    from deepspeed.sequence.layer import DistributedAttention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (1, L, H / N, D)
        if local == "flash4":
            from flash_attn.cute import flash_attn_func

            out = flash_attn_func(q, k, v, causal=p.causal)
            return out[0] if isinstance(out, tuple) else out
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=p.causal).transpose(1, 2)

    places = torch.arange(p.length, device=p.device).chunk(p.group.size)[p.group.rank]
    attention = DistributedAttention(attend, dist.group.WORLD, 2, 1)
    leaves = [leaf(x[None]) for x in (p.queries(places), *p.keys_values(places))]
    yield Way(
        lambda: attention(*leaves, 0)[0],
        p.output_gradients(places.numel()),
        leaves,
        2 * ulysses_bytes(p.length, p.group.size, p.shape, p.table.element_size()),
        places,
    )


@contextmanager
def ring_on_positions(p: Problem, rotate: str) -> Iterator[Way]:
    """torch's: keys and values of chunks go round, zigzag under a causal mask."""
    if p.device.type != "cuda":
        raise NotImplementedError("torch's context_parallel has no CPU kernel")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh(p.device.type, (p.group.size,))
    set_rotate_method(rotate)
    _cp_options.enable_load_balance = p.causal
    everything = torch.arange(p.length, device=p.device)
    whole = [x.transpose(0, 1)[None].contiguous() for x in (p.queries(everything), *p.keys_values(everything))]
    places = p.places()
    with context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 3, no_restore_buffers=set(whole)):
        leaves = [leaf(x) for x in whole]

        def forward() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(*leaves, is_causal=p.causal)[0].transpose(0, 1)

        with torch.enable_grad():
            # keys and values once round forward; backward once more, with their gradients beside them
            forth = ring_bytes(p.length, p.group.size, p.shape, p.table.element_size())
            yield Way(forward, p.output_gradients(places.numel()), leaves, 3 * forth, places)


def ways(causal: bool, args: argparse.Namespace) -> dict[str, Callable[[Problem], Any]]:
    local = args.local or ("flash4" if args.flash4 else "sdpa")
    mine: dict[str, Callable[[Problem], Any]] = {
        f"distinct rows, {how}": lambda p, h=how: distinct_rows(p, h) for how in ("ring", "all_gather", "auto")
    }
    if causal:
        mine = {"distinct rows, causal": causal_rows}
    rings = {f"ring on positions, {r}": lambda p, r=r: ring_on_positions(p, r) for r in ("alltoall", "allgather")}
    return mine | {f"Ulysses, {local}": lambda p: ulysses(p, local)} | rings


def all_reduced(value: float, device: torch.device, op: Any = dist.ReduceOp.SUM) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, op=op)
    return float(total)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds on this rank, which starts together with the others."""
    dist.barrier()
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begun)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(p: Problem, way: Way, repeats: int) -> dict[str, float | None]:
    """Error, bytes counted and by formula (of all ranks), bytes on NVLink, and milliseconds of the slowest rank."""
    out = way.to_positions(way.step())
    worst = all_reduced(p.error(out, way.places), p.device, dist.ReduceOp.MAX)
    way.step()
    counter = SentBytes()
    with counter:
        way.step()
    counted = all_reduced(sum(counter.bytes.values()), p.device)
    times = []
    for _ in range(repeats):
        times.append(all_reduced(timed(way.step, p.device), p.device, dist.ReduceOp.MAX))
    before = nvlink_bytes(torch.cuda.current_device()) if p.device.type == "cuda" else None
    wire = None
    if all_reduced(float(before is None), p.device) == 0:
        for _ in range(repeats):
            way.step()
        torch.cuda.synchronize()
        wire = (nvlink_bytes(torch.cuda.current_device()) or 0) - (before or 0)
        wire = all_reduced(wire / repeats, p.device)
    return {
        "error": worst,
        "bytes": counted
        or None,  # torch's ring sends from within DTensor's dispatch, below the mode: NVLink alone sees it
        "formula": float(way.expected_bytes),
        "nvlink": wire,
        "ms": statistics.median(times),
    }


def once_per_batch(p: Problem, repeats: int) -> dict[str, float]:
    """Of ours: routing the distinct tokens to their owners, and results of one stack back to positions, forward and backward."""
    chunk = p.tokens[p.places()]

    def route() -> OwnedRows:
        return OwnedRows.of(UniqueSpace.from_packed(chunk), HashOwners(p.group.size), p.group)

    owned = route()
    rows = leaf(p.table[owned.space.tokens, 0].flatten(1))
    gradient = p.output_gradients(chunk.numel()).flatten(1)

    def back() -> None:
        owned.to_positions(rows).backward(gradient)

    counter = SentBytes()
    with counter:
        route()
        back()
    found = {"bytes": all_reduced(sum(counter.bytes.values()), p.device)}
    for name, run in (("plan ms", route), ("return ms", back)):
        run()
        times = [all_reduced(timed(run, p.device), p.device, dist.ReduceOp.MAX) for _ in range(repeats)]
        found[name] = statistics.median(times)
    return found


def work(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(args.ranks))
    os.environ["LOCAL_RANK"] = str(rank)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=args.ranks)
    if find_spec("deepspeed") is not None:
        import deepspeed

        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for a minute
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    console = Console(width=150, quiet=rank > 0)
    text = standard_library_tokens(max(args.lengths)).to(device)
    shape = Shape(args.heads, args.heads, args.head_dim)
    results = []
    for length in args.lengths:
        for causal in args.causal:
            p = Problem(text[:length], shape, causal, device, getattr(torch, args.dtype), SSPGroup(dist.group.WORLD))
            case: dict[str, Any] = {"length": length, "causal": causal, "distinct": int(p.tokens.unique().numel())}
            case["once per batch"] = once_per_batch(p, args.repeats)
            case["ways"] = {}
            for name, make in ways(causal, args).items():
                try:
                    with make(p) as way:
                        case["ways"][name] = measure(p, way, args.repeats)
                except (ImportError, RuntimeError, NotImplementedError) as error:
                    case["ways"][name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            report(case, args, console)
            results.append(case)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps({"conditions": conditions(args), "cases": results}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def conditions(args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed") if find_spec(name)}
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none, gloo"
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{args.ranks} x {device}, {named}, NCCL {nccl}, H={args.heads} d={args.head_dim} {args.dtype}"


def report(case: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    length, distinct, once = case["length"], case["distinct"], case["once per batch"]
    title = f"L={length} U={distinct} {'causal' if case['causal'] else 'bidirectional'}; {conditions(args)}"
    table = Table(title=title)
    for column in ("way", "MB sent", "by formula", "on NVLink", "ms forward + backward", "error"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, found in case["ways"].items():
        if "failed" in found:
            table.add_row(name, found["failed"][:100], "", "", "", "")
            continue
        sizes = ["-" if x is None else f"{x / 1e6:.2f}" for x in (found["bytes"], found["formula"], found["nvlink"])]
        table.add_row(name, *sizes, f"{found['ms']:.2f}", f"{found['error']:.1e}")
    console.print(table)
    console.print(
        f"once per batch, ours: {once['bytes'] / 1e6:.2f} MB, plan {once['plan ms']:.2f} ms, return of rows to positions and of "
        f"their gradients {once['return ms']:.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--causal", type=int, nargs="+", default=[0, 1], help="0: bidirectional, 1: causal")
    parser.add_argument(
        "--local", choices=["flash4", "sdpa"], help="Ulysses' attention; by default flash-attn-4 if found"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    args = parser.parse_args()
    args.causal = [bool(c) for c in args.causal]
    args.flash4 = torch.cuda.is_available() and find_spec("flash_attn") is not None
    start_ranks(work, args)


if __name__ == "__main__":
    main()
