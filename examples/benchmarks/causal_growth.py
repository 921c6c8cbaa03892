"""How time and memory of attention grow with length on real text and DNA: on distinct tokens and over positions, causal and bidirectional.

    python examples/benchmarks/causal_growth.py --device cuda --out growth
    python examples/benchmarks/causal_growth.py --device cpu --lengths 4096 8192 16384 --heads 4 --out growth

Text is the Python standard library's source in file order, byte-pair encoded by a tokenizer trained on it here (pip install tokenizers);
DNA is the overlapping 6-mers of --fasta, or of random bases. Each time is one forward and backward of attention, the plan
(UniqueSpace, CausalChunks) included: "causal" has a query per position and keys per distinct token, "bidirectional" distinct rows on both
sides and their expansion to positions. Plain is the fastest of the kernels named by --plain on keys at every position. Rounds take turns;
medians.
Writes DIR/growth.json, growth.md and growth.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ta_plugin import UniqueSpace
from ta_plugin.attention import CausalChunks, alibi_slopes, causal_attention, choose_chunk, self_attention
from ta_plugin.attention.scoring import Scoring
from ta_plugin.data.fasta import kmer_ids, read_fasta

KMER = 6
CONSOLE = Console(width=150)
Step = Callable[[], None]


def text_tokens(count: int, vocabulary: int) -> Tensor:
    """At least `count` tokens of the standard library where it has as many, (n,) int64."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    texts = [p.read_text("utf-8", errors="ignore") for p in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += encoding.ids
        if len(ids) >= count:
            break
    return torch.tensor(ids)


def dna_tokens(count: int, fasta: Path | None) -> Tensor:
    """Overlapping 6-mers, (count,) int64 below 4096."""
    if fasta is None:
        bases = torch.randint(0, 4, (count + KMER - 1,), generator=torch.Generator().manual_seed(0))
        return kmer_ids(bases, KMER)
    found = torch.cat([kmer_ids(bases, KMER) for bases in read_fasta(fasta).values()])
    return found[found >= 0][:count]  # what holds an unknown base is left out


def tokenized(args: argparse.Namespace, tokens: Tensor, causal: bool) -> tuple[Step, Callable[[], dict[str, float]]]:
    """One step on distinct tokens, and the seconds of its plan, forward and backward apart."""
    rows = UniqueSpace.from_packed(tokens).num_rows
    q, k, v = (
        torch.randn(n, h, args.head_dim, device=args.device, dtype=args.dtype).requires_grad_()
        for n, h in ((tokens.numel() if causal else rows, args.heads), (rows, args.kv_heads), (rows, args.kv_heads))
    )
    dout = torch.randn(tokens.numel(), args.heads, args.head_dim, device=args.device, dtype=args.dtype)
    decay = alibi_slopes(args.heads, torch.device(args.device)) if args.decay else None

    def plan() -> Any:
        space = UniqueSpace.from_packed(tokens)
        if not causal:
            return space
        size = args.chunk or choose_chunk(space, args.heads, args.head_dim, tokens.device, args.decay).size
        return CausalChunks.of(space, size)

    def forward(plan: Any) -> Tensor:
        if causal:
            options = {"decay": decay, "backend": args.backend, "deterministic": args.repeatable}
            return causal_attention(plan.space, q, k, v, chunk=plan, **options)
        return plan.expand(self_attention(plan, q, k, v, scoring=Scoring(deterministic=args.repeatable)))

    def clear() -> None:
        q.grad = k.grad = v.grad = None

    def step() -> None:
        forward(plan()).backward(dout)
        clear()

    def apart() -> dict[str, float]:
        found: dict[str, Any] = {}

        def keep(name: str, value: Any) -> None:
            found[name] = value

        times = {"plan": seconds(args, lambda: keep("plan", plan()))}
        times["forward"] = seconds(args, lambda: keep("out", forward(found["plan"])))
        times["backward"] = seconds(args, lambda: found["out"].backward(dout))
        clear()
        return times

    return step, apart


def plain(args: argparse.Namespace, length: int, causal: bool) -> dict[str, Step]:
    """One step over positions by each kernel."""
    shape = (1, length, args.heads, args.head_dim)
    q, k, v = (torch.randn(shape, device=args.device, dtype=args.dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape, device=args.device, dtype=args.dtype)

    def step(attend: Callable[..., Tensor]) -> None:
        attend(q, k, v).backward(dout)
        q.grad = k.grad = v.grad = None

    def torch_sdpa(backend: SDPBackend, *qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=causal)
        return out.transpose(1, 2)

    def flash4(*qkv: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func

        out = flash_attn_func(*qkv, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    steps: dict[str, Step] = {}
    for name in args.plain:
        if name == "flash4":
            steps[name] = lambda: step(flash4)
        else:
            steps[name] = lambda backend=backends[name]: step(lambda *qkv: torch_sdpa(backend, *qkv))  # type: ignore[misc]
    return steps


def seconds(args: argparse.Namespace, run: Step) -> float:
    """Wall seconds of one call, to the end of the device's work."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(args: argparse.Namespace, run: Step) -> float | None:
    """Bytes that one call holds at most beyond what it starts with; None where torch does not count."""
    if args.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(args: argparse.Namespace, tokens: Tensor, causal: bool, skip: set[str]) -> dict[str, Any]:
    """Medians of all ways at one length. Kernels in `skip` are left out; those that grew too slow or failed are added to it."""
    ours, apart = tokenized(args, tokens, causal)
    steps = {"tokenized": ours} | {n: s for n, s in plain(args, tokens.numel(), causal).items() if n not in skip}
    times: dict[str, list[float]] = {}
    memory: dict[str, float | None] = {}
    for name, step in list(steps.items()):
        try:
            step()  # compiles, and fills caches
            times[name] = []
            memory[name] = peak(args, step)
        except Exception as error:
            CONSOLE.print(f"  {name} left out from L={tokens.numel()} on: {type(error).__name__} {str(error)[:120]}")
            skip.add(name)
            del steps[name]
    for _ in range(args.repeats):
        for name, step in steps.items():
            if not times[name] or sum(times[name]) < args.most_seconds:
                times[name].append(seconds(args, step))
    medians = {name: statistics.median(found) for name, found in times.items()}
    skip |= {name for name, found in medians.items() if name != "tokenized" and 4 * found > args.most_seconds}
    best = min((name for name in medians if name != "tokenized"), key=medians.__getitem__, default=None)
    return {
        "length": tokens.numel(),
        "distinct": tokens.unique().numel(),
        "seconds": medians,
        "bytes": memory,
        "apart": apart(),
        "best": best,
        "ratio": None if best is None else medians[best] / medians["tokenized"],
    }


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Slope of log y over log x by least squares, over the upper half of the lengths."""
    points = points[len(points) // 2 :] if len(points) > 3 else points
    if len(points) < 2:
        return None
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def curves(rows: list[dict[str, Any]], what: str) -> dict[str, list[tuple[float, float]]]:
    """(length, value) of tokenized and of the best plain kernel, what being "seconds" or "bytes"."""
    found: dict[str, list[tuple[float, float]]] = {"tokenized": [], "plain": []}
    for row in rows:
        for name, of in (("tokenized", "tokenized"), ("plain", row["best"])):
            value = row[what].get(of) if of else None
            if value:
                found[name].append((row["length"], value))
    return found


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per length, and the exponents."""
    lines = [
        f"### {title}",
        "",
        "| L | U | tokenized ms (plan + forward + backward) | plain ms | plain / tokenized | tokenized MiB | plain MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mib = [
            "-" if not name or not row["bytes"].get(name) else f"{row['bytes'][name] / 2**20:.0f}"
            for name in ("tokenized", row["best"])
        ]
        parts = " + ".join(f"{1e3 * row['apart'][n]:.1f}" for n in ("plan", "forward", "backward"))
        best = "-" if row["best"] is None else f"{1e3 * row['seconds'][row['best']]:.2f} ({row['best']})"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['length']} | {row['distinct']} | {1e3 * row['seconds']['tokenized']:.2f} ({parts}) | {best} | {ratio} | "
            f"{mib[0]} | {mib[1]} |"
        )
    for what in ("seconds", "bytes"):
        slopes = {name: exponent(points) for name, points in curves(rows, what).items()}
        lines.append(
            f"\nfitted exponent of {what}: "
            + ", ".join(f"{name} {'-' if slope is None else f'{slope:.2f}'}" for name, slope in slopes.items())
        )
    return "\n".join(lines) + "\n"


def draw(cases: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Log-log, a column per case: time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(cases), figsize=(4 * len(cases), 7), sharex=True, squeeze=False)
    for column, (title, rows) in enumerate(cases.items()):
        for axis, what in zip(axes[:, column], ("seconds", "bytes"), strict=True):
            for name, points in curves(rows, what).items():
                if points:
                    slope = exponent(points)
                    label = name if slope is None else f"{name}, L^{slope:.2f}"
                    axis.loglog(*zip(*points, strict=True), marker="o", label=label, base=2)
                    axis.legend()
            axis.set_ylabel(what)
            axis.grid(True, which="both", alpha=0.3)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("positions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in range(12, 21)])
    parser.add_argument("--data", nargs="+", default=["text", "dna"], choices=["text", "dna"])
    parser.add_argument("--modes", nargs="+", default=["causal", "bidirectional"], choices=["causal", "bidirectional"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="of the tokenized side; the plain side has --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--decay", action="store_true", help="ALiBi slopes on the tokenized side; the plain side goes without"
    )
    parser.add_argument("--chunk", type=int, help="instead of the cost model's")
    parser.add_argument("--backend", help="of the causal tokenized side")
    parser.add_argument(
        "--repeatable",
        action="store_true",
        help="the tokenized side's backward repeats to the bit; plain kernels' does not",
    )
    parser.add_argument(
        "--plain", nargs="*", choices=["cudnn", "flash", "flash4"], help="by default all that the device has"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most-seconds", type=float, default=6.0, help="per way and length; a slower one ends there")
    parser.add_argument("--vocabulary", type=int, default=32768, help="of the byte-pair tokenizer")
    parser.add_argument("--fasta", type=Path, help="a genome, plain or .gz, instead of random bases")
    parser.add_argument("--tokens", type=Path, help="cache of the text's tokens (.pt): read if there, written if not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("growth"))
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.kv_heads = args.kv_heads or args.heads
    if args.plain is None:
        args.plain = ["cudnn", "flash", "flash4"] if args.device == "cuda" else ["flash"]
    return args


def read(args: argparse.Namespace, data: str) -> Tensor:
    if data == "dna":
        return dna_tokens(max(args.lengths), args.fasta)
    if args.tokens is not None and args.tokens.exists():
        return torch.load(args.tokens).long()
    tokens = text_tokens(max(args.lengths), args.vocabulary)
    if args.tokens is not None:
        torch.save(tokens.int(), args.tokens)
    return tokens


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    said = f"{', ALiBi' if args.decay else ''}; forward and backward{', repeatable' if args.repeatable else ''}"
    header = (
        f"{name}, torch {torch.__version__}, {str(args.dtype).removeprefix('torch.')}, {args.heads} heads of {args.head_dim}, "
        f"{args.kv_heads} for keys{said}, plan included"
    )
    CONSOLE.print(header)
    args.out.mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[dict[str, Any]]] = {}
    for data in args.data:
        tokens = read(args, data)
        for mode in args.modes:
            rows = cases[f"{data}, {mode}"] = []
            skip: set[str] = set()
            for length in args.lengths:
                if length > tokens.numel():
                    CONSOLE.print(f"  {data} has {tokens.numel()} tokens only")
                    break
                row = measure(args, tokens[:length].to(args.device), mode == "causal", skip)
                rows.append(row)
                times = ", ".join(f"{n} {1e3 * s:.2f}" for n, s in row["seconds"].items())
                CONSOLE.print(f"{data} {mode} L={length} U={row['distinct']}: ms {times}; apart {row['apart']}")
                args.out.joinpath("growth.json").write_text(json.dumps({"header": header, "cases": cases}, indent=1))
    report = f"{header}\n\n" + "\n".join(table(title, rows) for title, rows in cases.items())
    args.out.joinpath("growth.md").write_text(report)
    print(report)
    draw(cases, args.out / "growth.png")


if __name__ == "__main__":
    main()
