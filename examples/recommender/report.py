"""What the recommender example shows: progress, one table, and the curves."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.table import Table

from ta_plugin.models.compare import Comparison
from ta_plugin.parallel import SSPGroup


@dataclass(frozen=True)
class Outcome:
    """A finished run: its log, test metrics, comparison with plain attention, and L/U over all histories."""

    name: str
    log: list[dict[str, Any]]
    test: dict[str, float]
    comparison: Comparison
    occurrences_per_distinct: float


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere, nothing on other ranks."""

    def __init__(self, name: str, steps: int, *, enabled: bool) -> None:
        self.name, self.steps, self.enabled = name, steps, enabled
        self.metrics = ""
        live = enabled and sys.stdout.isatty()
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
        )
        self.bar = rich.progress.Progress(*columns) if live else None
        self.task = self.bar.add_task(name, total=steps, figures="") if self.bar else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, row: dict[str, Any]) -> None:
        if not self.enabled:
            return
        if "ndcg@10" in row:
            self.metrics = f"  valid NDCG@10 {row['ndcg@10']:.4f}  HR@10 {row['hr@10']:.4f}"
        figures = f"loss {row['loss']:.4f}{self.metrics}"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif step % 25 == 0 or step == self.steps:
            print(f"{self.name}: step {step}/{self.steps}  {figures}", flush=True)


def print_outcomes(outcomes: list[Outcome], popularity: dict[str, float], group: SSPGroup) -> None:
    """Two tables: what the models reach, and what tokenized attention cost beside plain attention in the same run."""
    console = Console(width=118)
    quality = Table(title="Test: each user's last interaction, ranked among all items not seen before")
    for column in ("history tokens", "updates", "AUC", "HR@10", "NDCG@10"):
        quality.add_column(column, justify="left" if column == "history tokens" else "right")
    quality.add_row("(popularity)", "", *(f"{popularity[m]:.4f}" for m in ("auc", "hr@10", "ndcg@10")))
    for o in outcomes:
        updates = str(o.log[-1]["step"])
        quality.add_row(o.name, updates, *(f"{o.test[m]:.4f}" for m in ("auc", "hr@10", "ndcg@10")))
    console.print(quality)

    cost = Table(
        title=f"Tokenized / plain attention, same weights, same batches, {group.data_parallel_size} ranks, SSP = {group.size}"
    )
    for column in (
        "history tokens",
        "L/U",
        "tokens/s",
        "speed",
        "KiB sent per step",
        "sent",
        "step MiB",
        "largest difference",
    ):
        cost.add_column(column, justify="left" if column == "history tokens" else "right")
    for o in outcomes:
        c = o.comparison
        cost.add_row(
            o.name,
            f"{c.occurrences_per_row:.2f}",
            f"{c.tokenized.tokens_per_second:.0f} / {c.plain.tokens_per_second:.0f}",
            f"{c.tokenized.tokens_per_second / c.plain.tokens_per_second:.2f}x",
            f"{c.tokenized.bytes_sent / 1024:.0f} / {c.plain.bytes_sent / 1024:.0f}",
            f"{c.tokenized.bytes_sent / c.plain.bytes_sent:.2f}x" if c.plain.bytes_sent else "-",
            " / ".join(
                "?" if m.peak_memory is None else f"{m.peak_memory / 2**20:.0f}" for m in (c.tokenized, c.plain)
            ),
            f"{c.largest_difference:.1e} of {c.largest_logit:.1f}",
        )
    console.print(cost)
    console.print(
        "Forward and backward of the same batches, in turn. Sent: counted at the collectives' buffers, all ranks, without the "
        "gradients of dense parameters. Step MiB: memory a step takes, the largest of the ranks. Where L/U is 1 no user repeats a "
        "token and attention itself gains nothing; what is saved then is embeddings that several samples share, and keys that "
        "stay at their owners."
    )


def write_curves(outcomes: list[Outcome], popularity_valid: dict[str, float], path: Path) -> None:
    """Loss and validation NDCG@10 against updates, one line per run."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no curves: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    for o in outcomes:
        steps = [row["step"] for row in o.log]
        losses = [row["loss"] for row in o.log]
        smooth = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
        left.plot(steps, smooth, label=o.name)
        evaluated = [row for row in o.log if "ndcg@10" in row]
        right.plot([r["step"] for r in evaluated], [r["ndcg@10"] for r in evaluated], marker="o", label=o.name)
    left.set(xlabel="updates", ylabel="loss (mean of 20)", title="Sampled softmax loss")
    right.axhline(popularity_valid["ndcg@10"], color="grey", linestyle="--", label="popularity")
    right.set(xlabel="updates", ylabel="NDCG@10", title="Validation")
    left.legend()
    right.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"curves: {path}")
