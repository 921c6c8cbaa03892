"""What one layer sends when a sequence lies on several ranks: distinct rows in a ring, against positions in a ring and Ulysses.

    python examples/benchmarks/sequence_layout.py --ranks 4 --plot traffic.png

Starts `--ranks` gloo processes. Each reads its chunk of a text (words and punctuation of the Python standard library's source),
owns its share of the distinct tokens, and runs one layer of attention forward and backward; bytes are counted at the buffers.
The figures of ring attention over positions (Megatron's CP) and of Ulysses are formulas, since both send the same for any text.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import OwnedRows, Rates, ring_attention

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Shape:
    """Width of one layer: query heads, key and value heads, head_dim; `width` and `kv_width` are all heads side by side."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def ring_bytes(rows: int, ranks: int, shape: Shape, element: int = FLOAT) -> int:
    """Keys and values of `rows` once past every other rank, over all ranks: distinct rows for ours, positions for CP. Forward."""
    return (ranks - 1) * rows * 2 * shape.kv_width * element


def ulysses_bytes(length: int, ranks: int, shape: Shape, element: int = FLOAT) -> int:
    """All-to-alls of q, k, v and the output, of which a rank keeps 1 / N, over all ranks. Forward."""
    return length * (ranks - 1) * (2 * shape.width + 2 * shape.kv_width) * element // ranks


def standard_library_tokens(count: int) -> Tensor:
    """(count,) int64: words and punctuation of the standard library's modules in order of their names, then over again."""
    ids: dict[str, int] = {}
    found: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for word in re.findall(r"\w+|[^\w\s]|\n", path.read_text(errors="ignore")):
            found.append(ids.setdefault(word, len(ids)))
        if len(found) >= count:
            break
    tokens = torch.tensor(found[:count])
    return tokens.repeat(-(-count // tokens.numel()))[:count]


def measure(tokens: Tensor, shape: Shape, circulate: bool) -> list[int]:
    """One layer on this rank's chunk of tokens (L,): owned rows, bytes of keys and values sent forward and backward, and once."""
    group = SSPGroup(dist.group.WORLD)
    chunk = tokens.tensor_split(group.size)[group.rank]
    reader = UniqueSpace.from_padded(chunk[None], torch.tensor([chunk.numel()]))
    rates = Rates(1e9, 1e9, hop_seconds=0.0 if circulate else 1e9)
    owned = OwnedRows.of(reader, HashOwners(group.size), group, rates)
    rows = owned.space.num_rows
    q = torch.randn(rows, shape.heads, shape.head_dim, requires_grad=True)
    k, v = (torch.randn(rows, shape.kv_heads, shape.head_dim, requires_grad=True) for _ in range(2))
    out, _ = ring_attention(owned, q, k, v)
    owned.to_positions(out.flatten(1)).sum().backward()
    sent = group.traffic.bytes
    layer = [sum(sent[f"ring.{name}{end}"] for name in ("keys", "values")) for end in ("", ".grad")]
    return [rows, *layer, group.traffic.total_bytes() - sum(layer)]


def work(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    torch.manual_seed(rank)
    shape = Shape(args.heads, args.kv_heads, args.head_dim)
    text = standard_library_tokens(max(args.lengths))
    results = []
    for length in track(args.lengths, description="lengths", disable=rank > 0):
        mine = torch.tensor(measure(text[:length], shape, args.circulate))
        dist.all_reduce(mine)
        results.append([length, *mine.tolist()])
    if rank == 0:
        report(results, shape, args)
    dist.barrier()
    dist.destroy_process_group()


def report(results: list[list[int]], shape: Shape, args: argparse.Namespace) -> None:
    n = args.ranks
    table = Table(
        title=f"MB sent by all {n} ranks together, one layer, H={shape.heads} Hk={shape.kv_heads} d={shape.head_dim} fp32, torch "
        f"{torch.__version__}; ours counted, the others by formula"
    )
    columns = (
        "L",
        "U",
        "L/U",
        "ours",
        "ours backward",
        "once per batch",
        "CP ring",
        "Ulysses",
        "CP / ours",
        "Ulysses / ours",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for length, rows, forward, backward, once in results:
        assert forward == backward == ring_bytes(rows, n, shape), "counted bytes differ from (N - 1) * U * 2 D"
        others = ring_bytes(length, n, shape), ulysses_bytes(length, n, shape)
        sizes = [f"{x / 1e6:.2f}" for x in (forward, backward, once, *others)]
        table.add_row(str(length), str(rows), f"{length / rows:.1f}", *sizes, *(f"{x / forward:.1f}" for x in others))
    console = Console(width=140)
    console.print(table)
    console.print("counted bytes equal (N - 1) * U * 2 D, forward and backward")
    if args.plot:
        plot(results, shape, args)
        console.print(f"plot: {args.plot}")


def plot(results: list[list[int]], shape: Shape, args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, n = [r[0] for r in results], args.ranks
    lines = {
        "distinct rows in a ring (counted)": [r[2] for r in results],
        "CP: positions in a ring (formula)": [ring_bytes(x, n, shape) for x in lengths],
        "Ulysses (formula)": [ulysses_bytes(x, n, shape) for x in lengths],
    }
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, sizes), marker in zip(lines.items(), "osv", strict=True):
        axes.loglog(lengths, [x / 1e6 for x in sizes], marker=marker, label=name)
    axes.set(xlabel="L (tokens)", ylabel="MB per layer, forward, all ranks", title=f"{n} ranks, Python source")
    axes.legend()
    figure.savefig(args.plot, dpi=150)


def start_ranks(work: Callable[[int, int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """work(rank, port, args) in `args.ranks` processes, which meet at a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port, args), nprocs=args.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument(
        "--circulate", action=argparse.BooleanOptionalAction, default=True, help="or gather keys at once"
    )
    parser.add_argument("--plot", type=Path, help="a PNG to write (needs matplotlib)")
    start_ranks(work, parser.parse_args())


if __name__ == "__main__":
    main()
