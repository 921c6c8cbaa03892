"""Target attention that gathers rows by index, against its floor and against attention on rows written out.

    python examples/benchmarks/target_attention.py [--length 4096 16384] [--dtype bfloat16 float32] [--targets 1 4 8] [--peers occurrences]

Histories are Zipf ids; keys are the distinct ids of each sample, the table the distinct ids of the batch, one table (absorbed
projections: keys and values are the rows themselves). Floors are bytes over the bandwidth of a copy measured in the same run:
  forward   every needed row once per sample, its index, queries and outputs
  backward  the same, and for every key the queries' and output gradients' rows of its sample again, and the table's gradient
`moved` is what our backward has to move instead: it writes and reads 8 bytes for every pair where query rows are few
(csrc/target_attention/combine.cuh), else each shared key's part in float32.
Peers: `expanded` writes a row per key and calls weighted_attention (FlexAttention on CUDA); `occurrences` is torch's
scaled_dot_product_attention over every occurrence's row, which a reader without unique space would call (rows laid out before).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from measuring import Table, conditions, copy_bandwidth, median_ms, zipf_tokens
from torch import Tensor

from ta_plugin import UniqueSpace
from ta_plugin.attention import target_attention
from ta_plugin.ops import load_op


def passes(
    attend: Callable[..., Tensor], leaves: tuple[Tensor, ...], rows_of_grad: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward alone, and a backward alone on a graph that is kept."""
    out = attend(*leaves)
    grad = torch.randn_like(out)

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    def backward() -> None:
        torch.autograd.grad(out, leaves[:rows_of_grad], grad, retain_graph=True)

    return forward, backward


def measure(
    args: argparse.Namespace,
    printed: Table,
    case: tuple[str, int],
    space: UniqueSpace,
    ids: UniqueSpace,
    tokens: Tensor,
    rate: float,
) -> None:
    """The rows of a case: a dtype, and targets per sample."""
    kind, targets = case
    device, dtype, batch = tokens.device, getattr(torch, kind), tokens.shape[0]
    heads, dim, size = args.heads, args.dim, dtype.itemsize
    table = torch.randn(ids.num_rows, 1, dim, device=device, dtype=dtype).requires_grad_()
    q = torch.randn(batch * targets, heads, dim, device=device, dtype=dtype).requires_grad_()
    cu_q = torch.arange(0, batch * targets + 1, targets, dtype=torch.int32, device=device)
    weight = space.log_counts(dtype)
    common: dict[str, Any] = {"scale": dim**-0.5, "max_seqlen_q": targets}

    def gathered(q: Tensor, table: Tensor, backend: str = "compiled") -> Tensor:
        return target_attention(q, table, None, ids.segments, cu_q, space.cu_seqlens, weight, backend=backend, **common)

    works = {"ours": passes(gathered, (q, table), 2)}
    if "expanded" in args.peers:
        works["expanded"] = passes(lambda q, t: gathered(q, t, "expanded"), (q, table), 2)
    if "occurrences" in args.peers:
        everything = table.detach()[ids.inverse[space.inverse]].view(batch, 1, -1, dim).requires_grad_()
        grid = q.detach().view(batch, targets, heads, dim).transpose(1, 2).requires_grad_()

        def sdpa(grid: Tensor, rows: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(grid, rows, rows, scale=dim**-0.5, enable_gqa=True)

        works["occurrences"] = passes(sdpa, (grid, everything), 2)
    forward = median_ms({name: work[0] for name, work in works.items()}, args.rounds, device)
    backward = median_ms({name: work[1] for name, work in works.items()}, args.rounds, device)

    keys, per_query = space.num_rows, q.numel() * size
    lone = int((ids.counts == 1).sum())
    read = keys * (dim * size + 8) + per_query
    floors = read + per_query, read + keys * 2 * heads * targets * dim * size + (table.numel() * size) + 2 * per_query
    parts = (
        8 * heads * targets * keys
        if heads * targets <= 8 and batch * (4 if heads * targets <= 4 else 8) <= 4400
        else (keys - lone) * dim * 4
    )
    moved = read + 3 * per_query + 2 * parts + table.numel() * size + keys * 24
    flops = 4 * heads * targets * dim * keys
    low = [1e3 * x / rate for x in (*floors, moved)]
    sizes = [f"{tokens.shape[1]} ({space.num_occurrences / space.num_rows:.2f})", kind, heads * targets]
    for name in works:
        f, b = forward[name], backward[name]
        against = [""] * 3
        if name == "ours":
            against = [f"{bound:.3f} ({bound / x:.0%})" for bound, x in ((low[0], f), (low[2], b), (low[1], b))]
        times = [f"{f:.3f}", f"{flops / f / 1e9:.0f}", against[0], f"{b:.3f}", *against[1:]]
        printed.row(*sizes, name, *times)
    if len(works) > 1 and "expanded" in works:
        ours, peer = (gathered(q, table, backend).detach().float() for backend in ("compiled", "expanded"))
        printed.row(*sizes, f"largest difference from expanded: {float((ours - peer).abs().max()):.1e}", *[""] * 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--length", type=int, nargs="+", default=[4096])
    parser.add_argument("--vocab", type=int, default=4_000_000)
    parser.add_argument("--alpha", type=float, default=1.05)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--peers", nargs="*", default=["expanded", "occurrences"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    loaded = load_op("target_attention", device=device.type)
    if loaded.implementation != "compiled":
        parser.error(f"target_attention is not compiled for {device}: {loaded.reason}")
    torch._functorch.config.donated_buffer = False  # a backward of FlexAttention is timed on a graph that is kept
    rate = copy_bandwidth(device)
    sizes = f"B={args.batch} D={args.dim} H={args.heads}, Zipf {args.alpha} over {args.vocab} ids, one table"
    print(conditions(device, f"copy {rate / 1e12:.3f} TB/s", sizes))
    columns = ["L (L/U)", "dtype", "H*T", "way", "forward ms", "TFLOP/s", "floor ms (of it)", "backward ms"]
    printed = Table([*columns, "moved ms (of it)", "floor with q and dO again, ms (of it)"])
    for length in args.length:
        tokens = zipf_tokens(args.batch, length, args.vocab, args.alpha, device, seed=1)
        space = UniqueSpace.from_padded(tokens, torch.full((args.batch,), length, device=device))
        ids = UniqueSpace.from_packed(space.tokens)
        for kind in args.dtype:
            for targets in args.targets:
                measure(args, printed, (kind, targets), space, ids, tokens, rate)


if __name__ == "__main__":
    main()
