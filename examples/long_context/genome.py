"""Exact attention onto a whole genome: predict hidden bases from their neighbourhood and from every k-mer of the genome.

    bash examples/long_context/genome.sh                  takes E. coli 536 (4,938,920 bases) and runs this
    bash examples/long_context/genome.sh --minutes 2      as many steps as two minutes allow
    python examples/long_context/genome.py --fasta my.fa.gz [--k 6 --device cuda ...]

Queries are built from a local window by convolutions, in which positions are allowed; they attend to all 4.9 million k-mers of the
genome, which are at most 4 ** k distinct ones. The bases to predict are hidden in the windows, and every k-mer that overlaps one
leaves the counts. Trains three models for equal steps: with the genome's counts, with every k-mer counted once, and with the window
alone. Then times the global attention against plain attention over all positions for growing parts of the genome.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ta_plugin.data.fasta import read_fasta
from ta_plugin.data.genome import Genome
from ta_plugin.models.genome import GenomeModel

CONSOLE = Console(width=118)
ON_GPU = torch.cuda.is_available()
EVALUATION = 40  # batches of the held-out part
UNKNOWN = 4  # a base that is not to be predicted
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What a step draws: spans of `length` bases in windows with `flank` more on each side."""

    spans: int
    length: int
    flank: int


@dataclass(frozen=True)
class Variant:
    """A model to train: with attention onto the genome or without, and with its counts or every k-mer counted once."""

    name: str
    attend: bool
    count_once: bool

    def model(self, genome: Genome, dim: int) -> GenomeModel:
        torch.manual_seed(0)
        return GenomeModel(genome.kmers, genome.k, dim=dim, global_attention=self.attend).to(genome.bases.device)


VARIANTS = (
    Variant("window and genome", True, False),
    Variant("window and genome, every k-mer once", True, True),
    Variant("window", False, False),
)


@dataclass
class Outcome:
    """One trained model: bits per hidden base and share predicted right on the held-out tenth, and the losses on the way."""

    name: str
    bits: float
    accuracy: float
    steps_per_second: float
    losses: list[float]


def loss_of(model: GenomeModel, genome: Genome, task: Task, starts: Tensor, count_once: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of known hidden bases, and how many were predicted right, as a share; bf16 on a GPU. Reads nothing back."""
    counts = genome.counts_without(starts, task.length)
    if count_once:
        counts = counts.clamp(max=1)
    device = genome.bases.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(genome.windows(starts, task.length, task.flank), counts, task.length).flatten(0, 1).float()
    targets = genome.targets(starts, task.length).flatten()
    known = targets < UNKNOWN
    right = (logits.argmax(-1) == targets).logical_and(known).sum() / known.sum()
    return F.cross_entropy(logits, targets, ignore_index=UNKNOWN), right


class Training:
    """A model and what updates it."""

    def __init__(self, variant: Variant, genome: Genome, task: Task, dim: int, steps: int, rate: float) -> None:
        self.variant, self.genome, self.task = variant, genome, task
        self.model = variant.model(genome, dim)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01, fused=genome.bases.is_cuda
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps, pct_start=0.1)
        # the first nine tenths; drawn at once, since a copy from the host at every step would wait for the device
        spans = genome.spans(task.spans * steps, task.length, 0, border_of(genome), torch.Generator().manual_seed(0))
        self.starts = spans.view(steps, task.spans)

    def step(self, number: int) -> Tensor:
        loss, _ = loss_of(self.model, self.genome, self.task, self.starts[number], self.variant.count_once)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def border_of(genome: Genome) -> int:
    """Bases of the training part; the counts always cover the whole genome but the hidden spans."""
    return genome.bases.numel() * 9 // 10


def steps_that_fit(genome: Genome, task: Task, dim: int, seconds: float, most: int) -> int:
    """How many steps of every model fit, evaluation included, by the time of a few of each."""
    of_one, warm, timed = 0.0, 3, 8
    for variant in VARIANTS:
        training = Training(variant, genome, task, dim, warm + timed, 1e-3)
        for number in range(warm + timed):
            if number == warm:
                wait(genome.bases.device)
                started = time.perf_counter()
            training.step(number)
        wait(genome.bases.device)
        of_one += (time.perf_counter() - started) / timed
        CONSOLE.print(f"{variant.name}: tried {warm + timed} steps")
    return max(10, min(most, int(seconds / of_one) - EVALUATION // 3))  # a step without backward is about a third


def train(variant: Variant, genome: Genome, task: Task, dim: int, steps: int, rate: float) -> Outcome:
    """Train on the first nine tenths of the genome, measure on the last."""
    training = Training(variant, genome, task, dim, steps, rate)
    losses: list[Tensor] = []
    started = time.perf_counter()
    for number in range(steps):
        losses.append(training.step(number))
        if (number + 1) % max(1, steps // 10) == 0:
            recent = float(torch.stack(losses[-50:]).mean()) / math.log(2)
            CONSOLE.print(
                f"{variant.name}: step {number + 1}/{steps}, {recent:.4f} bits per hidden base in training, "
                f"{time.perf_counter() - started:.0f} s"
            )
    steps_per_second = steps / (time.perf_counter() - started)
    bits, accuracy = evaluate(training.model, genome, task, variant.count_once)
    return Outcome(
        variant.name, bits, accuracy, steps_per_second, (torch.stack(losses).double() / math.log(2)).tolist()
    )


@torch.no_grad()
def evaluate(model: GenomeModel, genome: Genome, task: Task, count_once: bool) -> tuple[float, float]:
    """On batches of the held-out part, the same for every model."""
    first, last, draw = border_of(genome), genome.bases.numel(), torch.Generator().manual_seed(1)
    starts = genome.spans(task.spans * EVALUATION, task.length, first, last, draw).view(EVALUATION, task.spans)
    found = torch.tensor([[float(x) for x in loss_of(model, genome, task, each, count_once)] for each in starts])
    loss, right = found.double().mean(0).tolist()
    return loss / math.log(2), right


def composition_bits(genome: Genome) -> float:
    """Bits per base when only the composition of the genome is known."""
    shares = torch.bincount(genome.bases[genome.bases < 4].long(), minlength=4).double()
    shares /= shares.sum()
    return float(-(shares * shares.log2()).sum())


def table_bits(genome: Genome) -> tuple[float, float]:
    """Bits per base of the last tenth by a table of the k - 1 bases before: counted in the whole genome, an occurrence never counting
    for itself, and in the first nine tenths. Their difference is all that the genome's counts could teach beyond the training part."""
    border = genome.bases.numel() * 9 // 10
    rows, seen = genome.rows[border:], genome.rows[: border - genome.k]
    rows, seen = rows[rows >= 0], seen[seen >= 0]
    context = torch.unique(genome.kmers // 4, return_inverse=True)[1]
    prior = 1.0 if genome.k <= 8 else 1 / 16

    def bits(counts: Tensor, own: int) -> float:
        of_context = torch.zeros(context.numel(), dtype=torch.float64, device=counts.device)
        of_context.index_add_(0, context, counts.double())
        share = (counts[rows] - own + prior) / (of_context[context[rows]] - own + 4 * prior)
        return -float(share.log2().mean())

    return bits(genome.counts, 1), bits(torch.bincount(seen, minlength=genome.counts.numel()), 0)


@dataclass(frozen=True)
class Cost:
    """Global attention of one step over the first `length` k-mers: seconds of forward and backward, and the bytes that a step holds at
    most beside its queries, keys and values included (None where torch does not count); plain by the fastest kernel, None if not run."""

    length: int
    distinct: int
    tokenized: float
    plain: float | None
    kernel: str | None
    difference: float | None
    tokenized_bytes: int | None
    plain_bytes: int | None


def plain_kernels(device: torch.device) -> dict[str, Attend]:
    """Attention over positions, q (T, H, D), k, v (L, H, D)."""

    def through_torch(backend: SDPBackend) -> Attend:
        def attend(*qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)

        return attend

    def flash4(*qkv: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func

        out = flash_attn_func(*(x[None] for x in qkv))
        return (out[0] if isinstance(out, tuple) else out)[0]

    if device.type != "cuda":
        return {"torch": through_torch(SDPBackend.FLASH_ATTENTION)}
    kernels = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {name: through_torch(backend) for name, backend in kernels.items()} | {"flash4": flash4}


@dataclass
class Measured:
    """One way of attending: its result, the median seconds of forward and backward, and the bytes it held at most."""

    out: Tensor
    seconds: float
    held: int | None


def measure(attend: Attend, q: Tensor, make: Callable[[], tuple[Tensor, Tensor]], repeats: int) -> Measured:
    """Of `attend` on q and the keys and values that `make` gives, gradients to all three."""
    device = q.device
    before = torch.cuda.memory_allocated() if q.is_cuda else 0
    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    leaves = (q, *(x.detach().requires_grad_() for x in make()))
    out = attend(*leaves)  # compiles, and fills caches
    dout = out.detach().clone()
    out.backward(dout)
    times = []
    for _ in range(repeats):
        for x in leaves:
            x.grad = None
        wait(device)
        started = time.perf_counter()
        attend(*leaves).backward(dout)
        wait(device)
        times.append(time.perf_counter() - started)
    q.grad = None
    held = torch.cuda.max_memory_allocated() - before if q.is_cuda else None
    return Measured(dout, statistics.median(times), held)


def measure_cost(genome: Genome, task: Task, model: GenomeModel, longest: int, repeats: int) -> list[Cost]:
    """Tokenized attends to the model's distinct k-mers, counting them included; plain to a key and a value at every position."""
    device = genome.bases.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.no_grad():
        k, v = (x.to(dtype) for x in model.keys_values())
    q = torch.randn(task.spans * task.length, *k.shape[1:], device=device).to(dtype).requires_grad_()
    kernels, found = plain_kernels(device), []
    lengths = [n for n in (10_000, 100_000, 1_000_000) if n < genome.rows.numel()] + [genome.rows.numel()]
    for length in lengths:
        rows = genome.rows[:length]
        rows = rows[rows >= 0]

        def tokenized(q: Tensor, k: Tensor, v: Tensor, rows: Tensor = rows) -> Tensor:
            return model.attend(q, k, v, torch.bincount(rows, minlength=genome.counts.numel()))

        def expanded(rows: Tensor = rows) -> tuple[Tensor, Tensor]:
            return k[rows], v[rows]

        ours = measure(tokenized, q, lambda: (k, v), repeats)
        peers: dict[str, Measured] = {}
        for name, attend in list(kernels.items()) if length <= longest else []:
            try:
                peers[name] = measure(attend, q, expanded, repeats)
            except Exception as error:  # out of memory, a size it does not take, not installed
                CONSOLE.print(f"{name} left out from {length:,} k-mers on: {type(error).__name__} {str(error)[:100]}")
                del kernels[name]
        best = min(peers, key=lambda name: peers[name].seconds, default=None)
        plain = None if best is None else peers[best]
        found.append(
            Cost(
                length,
                rows.unique().numel(),
                ours.seconds,
                None if plain is None else plain.seconds,
                best,
                None if plain is None else float((ours.out - plain.out).abs().max()),
                ours.held,
                None if plain is None else plain.held,
            )
        )
        said = ", ".join(f"{name} {1e3 * each.seconds:.2f}" for name, each in {"tokenized": ours, **peers}.items())
        CONSOLE.print(f"global attention over {length:,} k-mers, ms: {said}")
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(outcomes: list[Outcome], costs: list[Cost], genome: Genome, out: Path, conditions: str) -> None:
    """Two tables on the screen; results.json and genome.png in `out`."""
    table = Table(title=f"held-out tenth of the genome; {conditions}")
    for column in ("model", "bits per hidden base", "predicted right", "steps/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row("(composition of the genome)", f"{composition_bits(genome):.4f}", "", "")
    for each in outcomes:
        table.add_row(each.name, f"{each.bits:.4f}", f"{each.accuracy:.4f}", f"{each.steps_per_second:.1f}")
    CONSOLE.print(table)
    cost = Table(title="global attention of one step, forward + backward; plain reads every position")
    for column in ("k-mers L", "distinct U", "L/U", "time tokenized / plain", "largest difference", "MiB", "MiB plain"):
        cost.add_column(column, justify="right")
    for row in costs:
        ratio = "not run" if row.plain is None else f"{row.tokenized / row.plain:.4f} ({row.kernel})"
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        held = ["" if x is None else f"{x / 2**20:.0f}" for x in (row.tokenized_bytes, row.plain_bytes)]
        cost.add_row(
            f"{row.length:,}", f"{row.distinct:,}", f"{row.length / row.distinct:.0f}", ratio, difference, *held
        )
    CONSOLE.print(cost)
    out.mkdir(parents=True, exist_ok=True)
    everything = {
        "conditions": conditions,
        "models": [asdict(x) for x in outcomes],
        "costs": [asdict(x) for x in costs],
    }
    (out / "results.json").write_text(json.dumps(everything, indent=1))
    plot(outcomes, costs, out / "genome.png")
    CONSOLE.print(f"written: {out / 'results.json'}, {out / 'genome.png'}")


def plot(outcomes: list[Outcome], costs: list[Cost], path: Path) -> None:
    """Training curves, and time against the length attended to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for each in outcomes:
        width = max(1, len(each.losses) // 50)
        means = [statistics.mean(each.losses[max(0, i - width) : i + 1]) for i in range(len(each.losses))]
        left.plot(means, label=each.name)
    left.set(xlabel="step", ylabel="bits per hidden base (training, running mean)", title="Predicting hidden bases")
    left.legend()
    right.loglog([c.length for c in costs], [c.tokenized for c in costs], "o-", label="distinct k-mers (exact)")
    measured = [c for c in costs if c.plain is not None]
    right.loglog([c.length for c in measured], [c.plain for c in measured], "s-", label="every position")
    right.set(xlabel="k-mers attended to", ylabel="seconds, forward + backward", title="Global attention of one step")
    right.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    fasta: Annotated[Path, typer.Option(help="a genome, .fa or .fa.gz; several records are one genome")],
    out: Annotated[Path, typer.Option(help="results and plot go here")] = Path("runs/genome"),
    k: Annotated[int, typer.Option(help="bases of a token; 4 ** k tokens at the most")] = 6,
    steps: Annotated[int, typer.Option(help="updates of each model, at the most")] = 3000 if ON_GPU else 400,
    minutes: Annotated[
        float | None, typer.Option(help="of training, all models together: fewer steps if need be")
    ] = None,
    spans: Annotated[int, typer.Option(help="hidden spans a step")] = 1024 if ON_GPU else 64,
    length: Annotated[int, typer.Option(help="bases of a span")] = 4,
    flank: Annotated[int, typer.Option(help="bases seen on each side of a span")] = 48,
    dim: Annotated[int, typer.Option(help="width, of four heads together")] = 256 if ON_GPU else 64,
    learning_rate: Annotated[float | None, typer.Option(help="the highest of the schedule; 3e-3 at width 64")] = None,
    longest_plain: Annotated[int, typer.Option(help="positions up to which plain attention is timed")] = 5_000_000
    if ON_GPU
    else 1_000_000,
    repeats: int = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda" if ON_GPU else "cpu",
) -> None:
    """Train, compare, time, and report."""
    genome = Genome.of(read_fasta(fasta), k).to(device)
    CONSOLE.print(
        f"{fasta.name}: {genome.bases.numel():,} bases, {genome.num_occurrences:,} {k}-mers, {genome.kmers.numel():,} distinct "
        f"(L/U {genome.num_occurrences / genome.kmers.numel():,.0f})"
    )
    whole, part = table_bits(genome)
    CONSOLE.print(
        f"a table of {k}-mers: {whole:.4f} bits per base of the last tenth counted in the whole genome, {part:.4f} in the rest of it"
    )
    task = Task(spans, length, flank)
    if minutes is not None:
        steps = steps_that_fit(genome, task, dim, 60 * minutes, steps)
        CONSOLE.print(f"{steps} steps of each model fit {minutes:g} minutes")
    rate = learning_rate or 3e-3 * math.sqrt(64 / dim)
    outcomes = [train(variant, genome, task, dim, steps, rate) for variant in VARIANTS]
    costs = measure_cost(genome, task, VARIANTS[0].model(genome, dim), longest_plain, repeats)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    conditions = f"{steps} steps of {spans} spans x {length} bases, flank {flank}, dim {dim}, k {k}; torch {torch.__version__}, {where}"
    report(outcomes, costs, genome, out, conditions)


if __name__ == "__main__":
    typer.run(main)
