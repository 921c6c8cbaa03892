"""Self-attention over distinct tokens against torch's scaled_dot_product_attention over positions, forward and backward.

    python examples/benchmarks/tokenized_vs_positions.py

Tokenized time holds everything a batch costs: the plan (UniqueSpace), attention on the rows, the expansion to positions, and the
backward of both. The peer is F.scaled_dot_product_attention on the same values at every position; for ragged batches the faster of
one padded call with a mask and one call per sample. The two take turns; the table prints the median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ta_plugin import UniqueSpace
from ta_plugin.attention import self_attention

RATIOS = (1.0, 1.5, 2.0, 4.0, 8.0)


def draw(batch: int, length: int, ratio: float, ragged: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """tokens (B, L) and lengths (B,): each sample holds length / ratio distinct ids, in random order."""
    lengths = torch.full((batch,), length)
    if ragged:
        lengths = torch.randint(length // 4, length + 1, (batch,), generator=generator)
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    for b, n in enumerate(lengths.tolist()):
        distinct = max(1, round(n / ratio))
        ids = torch.randperm(50 * length, generator=generator)[:distinct]
        tokens[b, :n] = ids[torch.arange(n) % distinct][torch.randperm(n, generator=generator)]
    return tokens, lengths


def seconds(run: Callable[[], None]) -> float:
    """Wall seconds of one call, to the end of the device's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(args: argparse.Namespace, length: int, ratio: float, ragged: bool) -> tuple[float, float, float]:
    """Median ratio tokenized / positions, the largest output difference, and the measured L/U."""
    generator = torch.Generator().manual_seed(1)
    tokens, lengths = draw(args.batch, length, ratio, ragged, generator)
    space = UniqueSpace.from_padded(tokens, lengths)
    shape = (space.num_rows, args.heads, args.head_dim)
    rows = [torch.randn(shape, generator=generator).to(args.device).requires_grad_() for _ in range(3)]
    tokens, lengths = tokens.to(args.device), lengths.to(args.device)
    space = UniqueSpace.from_padded(tokens, lengths)
    # positions hold the same values; the layout a projection gives: (B, L, H, D) seen as (B, H, L, D)
    grids = [space.expand(x).detach().transpose(1, 2).requires_grad_() for x in rows]
    weigh = torch.randn(args.batch, length, args.heads, args.head_dim, generator=generator).to(args.device)
    weigh = weigh.masked_fill((torch.arange(length, device=args.device) >= lengths[:, None])[:, :, None, None], 0.0)
    mask = (torch.arange(length, device=args.device) < lengths[:, None])[:, None, None, :] if ragged else None

    def clear() -> None:
        for x in (*rows, *grids):
            x.grad = None

    def tokenized() -> None:
        plan = UniqueSpace.from_padded(tokens, lengths)
        plan.expand(self_attention(plan, *rows)).backward(weigh)

    def padded() -> None:
        F.scaled_dot_product_attention(*grids, attn_mask=mask).backward(weigh.transpose(1, 2))

    def one_by_one() -> None:
        for b, n in enumerate(lengths.tolist()):
            q, k, v = (x[b : b + 1, :, :n] for x in grids)
            F.scaled_dot_product_attention(q, k, v).backward(weigh[b : b + 1, :n].transpose(1, 2))

    peers = [padded, one_by_one] if ragged else [padded]
    for run in (tokenized, *peers):
        run()
        clear()
    ratios = []
    for _ in range(args.repeats):
        ours = seconds(tokenized)
        clear()
        theirs = []
        for peer in peers:
            theirs.append(seconds(peer))
            clear()
        ratios.append(ours / min(theirs))
    with torch.no_grad():
        ours = space.expand(self_attention(space, *rows))
        theirs = F.scaled_dot_product_attention(*grids, attn_mask=mask).transpose(1, 2)
        valid = (torch.arange(length, device=args.device) < lengths[:, None])[:, :, None, None]
        difference = float((ours - theirs).masked_fill(~valid, 0.0).abs().max())
    return statistics.median(ratios), difference, space.num_occurrences / space.num_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(
        title=f"time of tokenized over positions, forward + backward; B={args.batch} H={args.heads} d={args.head_dim} fp32, "
        f"{args.device}, {args.threads} threads, torch {torch.__version__}; below 1 is faster"
    )
    for column in ("L", "lengths", *(f"L/U {r:g}" for r in RATIOS), "largest difference"):
        table.add_column(column, justify="right")
    console = Console(width=118)
    for length in args.lengths:
        for ragged in (False, True):
            found = [measure(args, length, ratio, ragged) for ratio in RATIOS]
            cells = [f"{ratio:.2f}" for ratio, _, _ in found]
            table.add_row(str(length), "ragged" if ragged else "equal", *cells, f"{max(d for _, d, _ in found):.1e}")
            console.print(f"L={length} {'ragged' if ragged else 'equal'}: {' '.join(cells)}")
    console.print(table)


if __name__ == "__main__":
    main()
