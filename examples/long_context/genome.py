"""Exact attention onto a whole genome: predict hidden bases from their neighbourhood and from every k-mer of the genome.

    bash examples/long_context/genome.sh            takes E. coli 536 (4,938,920 bases) and runs this
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
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ta_plugin.data.fasta import read_fasta
from ta_plugin.data.genome import Genome
from ta_plugin.models.genome import GenomeModel

CONSOLE = Console(width=118)
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Task:
    """What a step draws: spans of `length` bases in windows with `flank` more on each side."""

    spans: int
    length: int
    flank: int


@dataclass
class Outcome:
    """One trained model: bits per hidden base and share predicted right on the held-out tenth, and the losses on the way."""

    name: str
    bits: float
    accuracy: float
    steps_per_second: float
    losses: list[float]


def loss_of(model: GenomeModel, genome: Genome, task: Task, starts: Tensor, count_once: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of known hidden bases, and how many were predicted right, as a share."""
    counts = genome.counts_without(starts, task.length)
    if count_once:
        counts = counts.clamp(max=1)
    logits = model(genome.windows(starts, task.length, task.flank), counts, task.length)
    targets = genome.targets(starts, task.length).flatten()
    known = targets < 4
    right = (logits.flatten(0, 1).argmax(-1) == targets)[known].float().mean()
    return F.cross_entropy(logits.flatten(0, 1)[known], targets[known]), right


def train(
    name: str, model: GenomeModel, genome: Genome, task: Task, steps: int, rate: float, count_once: bool
) -> Outcome:
    """Train on the first nine tenths, measure on the last; the counts always cover the whole genome but the hidden spans."""
    border = genome.bases.numel() * 9 // 10
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    started = time.perf_counter()
    with Progress(console=CONSOLE, transient=True) as progress:
        bar = progress.add_task(name, total=steps)
        for step in range(steps):
            starts = genome.spans(task.spans, task.length, 0, border, draw)
            loss, _ = loss_of(model, genome, task, starts, count_once)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item() / math.log(2))
            progress.update(bar, advance=1)
            if (step + 1) % max(1, steps // 5) == 0:
                recent = statistics.mean(losses[-50:])
                CONSOLE.print(f"{name}: step {step + 1}/{steps}, {recent:.4f} bits per hidden base in training")
    rate_of_steps = steps / (time.perf_counter() - started)
    bits, accuracy = evaluate(model, genome, task, border, count_once)
    return Outcome(name, bits, accuracy, rate_of_steps, losses)


@torch.no_grad()
def evaluate(model: GenomeModel, genome: Genome, task: Task, border: int, count_once: bool) -> tuple[float, float]:
    """On 40 batches of the held-out part, the same for every model."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(40):
        starts = genome.spans(task.spans, task.length, border, genome.bases.numel(), draw)
        loss, right = loss_of(model, genome, task, starts, count_once)
        found.append((loss.item() / math.log(2), right.item()))
    return statistics.mean(b for b, _ in found), statistics.mean(a for _, a in found)


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
    """Global attention of one step over the first `length` k-mers, forward and backward, in seconds."""

    length: int
    distinct: int
    tokenized: float
    plain: float | None
    difference: float | None


def measure_cost(genome: Genome, task: Task, model: GenomeModel, longest: int, repeats: int) -> list[Cost]:
    """Both ways take turns; plain attention reads a key and a value for every position, tokenized counts included."""
    device = genome.bases.device
    queries = torch.randn(task.spans * task.length, model.query.out_features, device=device)
    found = []
    lengths = [n for n in (10_000, 100_000, 1_000_000) if n < genome.rows.numel()] + [genome.rows.numel()]
    for length in lengths:
        rows = genome.rows[:length]
        rows = rows[rows >= 0]
        distinct, inverse = rows.unique(return_inverse=True)

        def tokenized(rows: Tensor = rows) -> Tensor:
            counts = torch.bincount(rows, minlength=genome.counts.numel())
            return model.attend(model.queries(queries), *model.keys_values(), counts)

        def plain(distinct: Tensor = distinct, inverse: Tensor = inverse) -> Tensor:
            k, v = (x[distinct][inverse].transpose(0, 1)[None] for x in model.keys_values())
            return F.scaled_dot_product_attention(model.queries(queries).transpose(0, 1)[None], k, v)[0].transpose(0, 1)

        ways: list[Callable[[], Tensor]] = [tokenized] + ([plain] if length <= longest else [])
        times: list[list[float]] = [[] for _ in ways]
        outs = [way().detach() for way in ways]
        for _ in range(repeats):
            for way, seconds in zip(ways, times, strict=True):
                _wait(device)
                started = time.perf_counter()
                way().square().sum().backward()
                _wait(device)
                seconds.append(time.perf_counter() - started)
                model.zero_grad()
        medians = [statistics.median(seconds) for seconds in times]
        both = len(ways) == 2
        difference = float((outs[0] - outs[1]).abs().max()) if both else None
        found.append(Cost(length, distinct.numel(), medians[0], medians[1] if both else None, difference))
        CONSOLE.print(f"global attention over {length:,} k-mers measured")
    return found


def _wait(device: torch.device) -> None:
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
    for column in ("k-mers L", "distinct U", "L/U", "time tokenized / plain", "largest difference"):
        cost.add_column(column, justify="right")
    for row in costs:
        ratio = "not run" if row.plain is None else f"{row.tokenized / row.plain:.4f}"
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        cost.add_row(f"{row.length:,}", f"{row.distinct:,}", f"{row.length / row.distinct:.0f}", ratio, difference)
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
    steps: Annotated[int, typer.Option(help="updates of each model")] = 3000 if ON_GPU else 400,
    spans: Annotated[int, typer.Option(help="hidden spans a step")] = 64,
    length: Annotated[int, typer.Option(help="bases of a span")] = 4,
    flank: Annotated[int, typer.Option(help="bases seen on each side of a span")] = 48,
    dim: int = 64,
    learning_rate: float = 3e-3,
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
    outcomes, models = [], []
    variants = (
        ("window and genome", True, False),
        ("window and genome, every k-mer once", True, True),
        ("window", False, False),
    )
    for name, attend, once in variants:
        torch.manual_seed(0)
        model = GenomeModel(genome.kmers, k, dim=dim, global_attention=attend).to(device)
        outcomes.append(train(name, model, genome, task, steps, learning_rate, once))
        models.append(model)
    costs = measure_cost(genome, task, models[0], longest_plain, repeats)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    conditions = f"{steps} steps of {spans} spans x {length} bases, flank {flank}, dim {dim}, k {k}; torch {torch.__version__}, {where}"
    report(outcomes, costs, genome, out, conditions)


if __name__ == "__main__":
    typer.run(main)
