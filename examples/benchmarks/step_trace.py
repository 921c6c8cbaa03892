"""A profile of the owner step: how much of its collectives runs beside computation, and what the host does in it.

    torchrun --nproc-per-node 2 examples/benchmarks/step_trace.py --lengths 4096 --dtype bfloat16 --folder traces
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/benchmarks/step_trace.py --batch 2 --lengths 64 --vocab 500 --dim 16

Writes one Chrome trace per rank (chrome://tracing, ui.perfetto.dev) and prints, for forward and backward, or for the replay of both with
`--way captured`, and of each of the longest kernels with `--kernels 30`: the time in which a
collective ran (the union of its kernels; that of gloo's works on the CPU), the part of it in which something else computed too, and
launches, waits for the device and reads from it. A collective's kernel also runs while it waits for the other ranks, which start their
steps together here.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import machine, zipf_tokens
from owner_step import add_sizes, build, start
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from ta_plugin import CapturedStep, SSPGroup, UniqueSpace
from ta_plugin.parallel import create_ssp_group

PHASES = {"captured": ("replay",)}  # of other ways: forward and backward
LAUNCHES = ("LaunchKernel", "GraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense", "aten::nonzero")
Spans = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Disjoint spans in order."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def common(a: Spans, b: Spans) -> float:
    """How long two unions of spans run at the same time."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        i, j = (i + 1, j) if a[i][1] < b[j][1] else (i, j + 1)
    return total


@dataclass(frozen=True)
class Phase:
    """Of one phase of a step: milliseconds of wall clock on the host, of collectives, of computation, of both together; and counts."""

    wall: float
    collective: float
    compute: float
    both: float
    launches: int
    waits: int
    reads: int

    @classmethod
    def of(cls, events: list[dict[str, Any]], name: str) -> Phase:
        """From the events of a Chrome trace, of what was launched or ran between the phase's ends on the host."""
        begin, end = next(
            (e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == name and e.get("cat") == "user_annotation"
        )
        inside = [e for e in events if begin <= e["ts"] <= end]
        launched = {e["args"]["correlation"] for e in inside if "correlation" in e.get("args", {}) and not _on_gpu(e)}
        kernels = [e for e in events if _on_gpu(e) and e["args"].get("correlation") in launched]
        if not kernels:  # on the CPU: works of gloo's threads beside operators of this one
            kernels = [e for e in inside if e["name"].startswith(("gloo:", "aten::", "ta_plugin::"))]
        collective, compute = (
            union((e["ts"], e["ts"] + e["dur"]) for e in kernels if _is_collective(e) == wanted)
            for wanted in (True, False)
        )
        ms = [x / 1e3 for x in (end - begin, length(collective), length(compute), common(collective, compute))]
        launches = sum(any(x in e["name"] for x in LAUNCHES) for e in inside)
        return cls(*ms, launches, sum(e["name"] in WAITS for e in inside), sum(e["name"] in READS for e in inside))


def _on_gpu(event: dict[str, Any]) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _is_collective(event: dict[str, Any]) -> bool:
    return event["name"].startswith(("nccl", "gloo:"))


def trace(args: argparse.Namespace, group: SSPGroup, tokens_per_sample: int, file: Path) -> list[dict[str, Any]]:
    """The events of one step, after two to warm up; the trace is left in `file`."""
    device, dtype = group.device, getattr(torch, args.dtype)
    tokens = zipf_tokens(args.batch, tokens_per_sample, args.vocab, args.alpha, device, seed=group.rank)
    targets = zipf_tokens(args.batch, args.targets, args.vocab, args.alpha, device, seed=1000 + group.rank)
    lengths = torch.full((args.batch,), tokens_per_sample, device=device)
    grad = torch.randn(args.batch, args.targets, args.dim, device=device).to(dtype)

    ways = build(args, group, tokens_per_sample, dtype, UniqueSpace.from_padded(tokens, lengths))
    model = ways[args.way]

    def step(*inputs: Tensor) -> None:
        tokens, lengths, targets, grad = inputs
        with record_function("forward"):
            out = model(tokens, lengths, targets=targets)
        with record_function("backward"):
            out.backward(grad)

    inputs = [tokens, lengths, targets, grad]
    run = CapturedStep(step, [model], inputs) if args.way == "captured" else step

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(2):
        run(*inputs)
    if group.group is not None:
        dist.barrier(group.group)
    with profile(activities=activities) as profiled:
        with record_function("replay"):
            run(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiled.export_chrome_trace(str(file))
    table: Any = model.embedding_fn
    table.recorded.clear()
    with gzip.open(file, "rt") as written:
        events: list[dict[str, Any]] = [e for e in json.load(written)["traceEvents"] if e.get("ph") == "X"]
    return events


def print_kernels(events: list[dict[str, Any]], most: int) -> None:
    """The longest kernels and copies by the sum over their calls."""
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for e in filter(_on_gpu, events):
        name = e["name"][:110]
        total[name] += e["dur"]
        calls[name] += 1
    print(f"{sum(calls.values())} kernels and copies, {sum(total.values()) / 1e3:.3f} ms; microseconds, calls, name:")
    for name, duration in total.most_common(most):
        print(f"  {duration:8.1f} {calls[name]:4d}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--way", choices=["owner", "unique", "captured"], default="owner")
    parser.add_argument("--kernels", type=int, default=0, help="how many of the longest kernels to print")
    parser.add_argument("--folder", type=Path, default=Path("traces"))
    args = parser.parse_args()
    device, world, first = start()
    args.folder.mkdir(parents=True, exist_ok=True)
    group = create_ssp_group(world, device=device)
    if first:
        print(
            f"{machine(device)}; {args.way}, {world} rank(s); per rank B={args.batch} D={args.dim} T={args.targets} {args.dtype}"
        )
        columns = ["L", "phase", "host, ms", "collectives, ms", "computation, ms", "both at once, ms", "of collectives"]
        columns += ["launches", "waits", "reads"]
        print(f"| {' | '.join(columns)} |\n|" + " --- |" * len(columns), flush=True)
    for tokens_per_sample in args.lengths:
        file = args.folder / f"{args.way}.L{tokens_per_sample}.rank{group.rank}.json.gz"
        events = trace(args, group, tokens_per_sample, file)
        for name in PHASES.get(args.way, ("forward", "backward")):
            p = Phase.of(events, name)
            share = f"{p.both / p.collective:.0%}" if p.collective else "-"
            ms = f"{p.wall:.2f} | {p.collective:.3f} | {p.compute:.3f} | {p.both:.3f} | {share}"
            if first:
                print(f"| {tokens_per_sample} | {name} | {ms} | {p.launches} | {p.waits} | {p.reads} |", flush=True)
        if first and args.kernels:
            print_kernels(events, args.kernels)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
