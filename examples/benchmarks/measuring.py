"""What the benchmarks share: Zipf histories, medians over device events, the floor's bandwidth, and tables as README.md holds them."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def zipf_tokens(batch: int, length: int, vocab: int, alpha: float, device: torch.device, seed: int) -> Tensor:
    """(B, L) int64 ids drawn with probability proportional to 1 / (rank + 1) ** alpha over `vocab` ids."""
    generator = torch.Generator(device).manual_seed(seed)
    shares = torch.arange(1, vocab + 1, dtype=torch.float64, device=device).pow(-alpha).cumsum(0)
    draws = torch.rand(batch, length, dtype=torch.float64, device=device, generator=generator) * shares[-1]
    return torch.searchsorted(shares, draws).clamp(max=vocab - 1)


def median_ms(
    works: dict[str, Callable[[], Any]], rounds: int, device: torch.device, meet: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median milliseconds of each, taking turns, after one call each to warm up. On a GPU between device events.

    `meet` is called before each, so that ranks start together: else what they start apart is timed.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            if meet is not None:
                meet()
            if device.type != "cuda":
                started = time.perf_counter()
                work()
                times[name].append(1e3 * (time.perf_counter() - started))
                continue
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(5_000_000)  # cycles: the host gets ahead, and its launches are not timed
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(x) for name, x in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device copy, bytes read plus bytes written: what the floors divide by."""
    size = (2 << 30) if device.type == "cuda" else (64 << 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).fill_(i) for i in range(2))
    ms = median_ms({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * size / ms * 1e3


def machine(device: torch.device, packages: Sequence[str] = ()) -> str:
    """Device and versions: of torch, and of other packages by name."""
    cuda, ranks = device.type == "cuda", int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    found = [f"{ranks} x {where}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if cuda:
        found.append(f"CUDA {torch.version.cuda}")
        if ranks > 1:
            found.append("NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    for name in packages:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def command() -> str:
    """What this process was started by; paths of files by their names alone."""
    script, *arguments = sys.argv
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    start = "python" if ranks is None else f"torchrun --nproc-per-node {ranks}"
    shown = [Path(x).name if os.sep in x and Path(x).exists() else x for x in arguments]
    return f"{start} examples/benchmarks/{Path(script).name} {shlex.join(shown)}".rstrip()


def conditions(device: torch.device, *facts: str, packages: Sequence[str] = ()) -> str:
    """The line above a table: command, date, machine and versions, and what else holds for all of it."""
    return "; ".join([f"`{command()}`, {date.today().isoformat()}, {machine(device, packages)}", *facts])


class Table:
    """A table in Markdown whose rows are printed, by `say`, as they come: what README.md holds."""

    def __init__(self, columns: Sequence[str], say: Callable[[str], object] | None = None) -> None:
        self.columns, self.say = columns, say or (lambda line: print(line, flush=True))
        self.say("")
        self.row(*columns)
        self.row(*["---"] * len(columns))

    def row(self, *cells: object) -> None:
        """One cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns; pass one for each: {self.columns}")
        self.say(f"| {' | '.join(str(cell) for cell in cells)} |")


class CubSort:
    """CUB's SortPairs from a shared library, cub_sort.cu compiled."""

    def __init__(self, library: str) -> None:
        self.sort = ctypes.CDLL(library).cub_sort_pairs

    def work(self, keys: Tensor, end_bit: int) -> Callable[[], object]:
        """A call that sorts int64 keys by their lowest bits, with 32-bit values."""
        keys = keys.reshape(-1)
        n = keys.numel()
        values = torch.arange(n, device="cuda", dtype=torch.int32)
        keys_out, values_out = torch.empty_like(keys), torch.empty_like(values)
        size = ctypes.c_size_t(0)

        def call(temporary: Tensor | None) -> None:
            arrays = (ctypes.c_void_p(x.data_ptr()) for x in (keys, keys_out, values, values_out))
            where = ctypes.c_void_p(0 if temporary is None else temporary.data_ptr())
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = self.sort(where, ctypes.byref(size), *arrays, n, end_bit, stream)
            assert status == 0, status

        call(None)
        temporary = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        call(temporary)
        assert bool((keys_out[1:] >= keys_out[:-1]).all())
        return lambda: call(temporary)


def compiled_cub_sort() -> str:
    """The library, compiled for this machine's GPU."""
    library = str(Path(tempfile.mkdtemp()) / "cub_sort.so")
    source = Path(__file__).with_name("cub_sort.cu")
    subprocess.run(
        ["nvcc", "-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", source, "-o", library],
        check=True,
    )
    return library
