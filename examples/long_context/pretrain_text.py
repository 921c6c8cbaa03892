"""Pretrain small language models on source text: rotary attention everywhere, against stacks with token-keyed global layers.

    python examples/long_context/pretrain_text.py                            the Python standard library, on the CPU small, on a GPU larger
    python examples/long_context/pretrain_text.py --folder src --pattern '*.c' --context 16384

Three models of equal depth and width, on the same batches in the same order:
* rotary:  every layer is causal rotary attention over the whole context;
* mixed:   rotary attention within a sliding window, and every n-th layer token-keyed and global: its keys and values come from the
           token, so that it runs on distinct tokens, exactly;
* window:  the mixed stack without its global layers, which shows what those add.

Reports validation loss at equal steps, and at equal time by a second run of each model faster or slower than the first, whose steps and
learning-rate schedule fill the first one's time; with a plot. Token-keyed layers are another architecture, not a faster
rotary layer: where the loss is worse, the table says so.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ta_plugin.data.text import TokenStream, source_files, split_files, train_tokenizer
from ta_plugin.models.mixed_decoder import MixedDecoder, MixedDecoderConfig

CONSOLE = Console(width=118)
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Settings:
    """What every model shares."""

    context: int
    batch: int
    steps: int
    evaluate_every: int
    validation: int
    learning_rate: float
    device: torch.device
    bf16: bool


@dataclass
class Curve:
    """One model's run: (step, seconds of training so far, validation loss in nats per token), and what it takes."""

    name: str
    parameters: int
    points: list[tuple[int, float, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Validation loss at the end."""
        return self.points[-1][2]

    @property
    def seconds(self) -> float:
        """Of training."""
        return self.points[-1][1]


def loss_of(model: MixedDecoder, sequences: Tensor, settings: Settings) -> Tensor:
    """Mean cross-entropy of the next token: sequences (S, L + 1), each attended on its own."""
    count, length = sequences.shape[0], sequences.shape[1] - 1
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=settings.device)
    sequences = sequences.to(settings.device)
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16):
        logits = model(sequences[:, :-1].flatten(), bounds)
    return F.cross_entropy(logits.float(), sequences[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: MixedDecoder, held_out: TokenStream, settings: Settings) -> float:
    """Over the first `validation` whole sequences of the held-out stream."""
    losses = []
    for number, sequence in enumerate(held_out.in_order(settings.context)):
        if number == settings.validation:
            break
        losses.append(loss_of(model, sequence, settings).item())
    return statistics.mean(losses)


def train(
    name: str, config: MixedDecoderConfig, stream: TokenStream, held_out: TokenStream, settings: Settings
) -> Curve:
    """Train one model; evaluations are not counted in its time."""
    torch.manual_seed(0)
    model = MixedDecoder(config).to(settings.device)
    curve = Curve(name, sum(p.numel() for p in model.parameters()))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    draw = torch.Generator().manual_seed(0)
    warm = stream.random(settings.batch, settings.context, torch.Generator().manual_seed(1))
    loss_of(model, warm, settings).backward()  # compilation and allocator, outside the clock; the gradient is dropped
    optimizer.zero_grad()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    elapsed = 0.0
    curve.points.append((0, 0.0, evaluate(model, held_out, settings)))
    with Progress(console=CONSOLE, transient=True) as progress:
        bar = progress.add_task(name, total=settings.steps)
        for step in range(1, settings.steps + 1):
            batch = stream.random(settings.batch, settings.context, draw)
            _wait(settings)
            started = time.perf_counter()
            loss_of(model, batch, settings).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            _wait(settings)
            curve.step_seconds.append(time.perf_counter() - started)
            elapsed += curve.step_seconds[-1]
            progress.update(bar, advance=1)
            if step % settings.evaluate_every == 0 or step == settings.steps:
                curve.points.append((step, elapsed, evaluate(model, held_out, settings)))
                CONSOLE.print(f"{name}: step {step}/{settings.steps}, validation loss {curve.points[-1][2]:.4f}")
    curve.peak_bytes = torch.cuda.max_memory_allocated() if ON_GPU else None
    return curve


def _wait(settings: Settings) -> None:
    if settings.device.type == "cuda":
        torch.cuda.synchronize()


def report(curves: list[Curve], timed: list[Curve], ratio: float, conditions: str, out: Path) -> None:
    """The table, results.json and curves.png. curves: at equal steps; timed: in equal time; the first is the same run in both."""
    baseline = curves[0]
    steps = baseline.points[-1][0]
    table = Table(title=f"validation loss, nats per token; {conditions}; L/U {ratio:.1f}")
    for column in (
        "model",
        "parameters",
        f"loss at step {steps}",
        "loss at equal time",
        "(its steps)",
        "time of a step",
        "peak memory",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    base_time = statistics.median(baseline.step_seconds)
    for curve, other in zip(curves, timed, strict=True):
        memory = "" if curve.peak_bytes is None else f"{curve.peak_bytes / 2**30:.2f} GiB"
        ratio_of_time = f"{statistics.median(curve.step_seconds) / base_time:.2f}x"
        table.add_row(
            curve.name,
            f"{curve.parameters:,}",
            f"{curve.loss:.4f}",
            f"{other.loss:.4f}",
            str(other.points[-1][0]),
            ratio_of_time,
            memory,
        )
    CONSOLE.print(table)
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "conditions": conditions,
        "occurrences_per_distinct": ratio,
        "models": [asdict(curve) for curve in curves],
        "equal_time": [asdict(curve) for curve in timed],
    }
    (out / "results.json").write_text(json.dumps(found, indent=1))
    plot(curves, timed, out / "curves.png")
    CONSOLE.print(f"written: {out / 'results.json'}, {out / 'curves.png'}")


def plot(curves: list[Curve], timed: list[Curve], path: Path) -> None:
    """Validation loss of the runs of equal steps against steps, and of those of equal time against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    unit = axes[1].get_xaxis()
    whole = curves[0].seconds
    for curve, other in zip(curves, timed, strict=True):
        axes[0].plot([p[0] for p in curve.points], [p[2] for p in curve.points], "o-", markersize=3, label=curve.name)
        axes[1].plot([p[1] / whole for p in other.points], [p[2] for p in other.points], "o-", markersize=3)
    axes[0].set(xlabel="step", ylabel="validation loss (nats per token)", title="equal steps")
    axes[1].set(title="equal time")
    unit.set_label_text("time of training (1: the first model's)")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    folder: Annotated[Path | None, typer.Option(help="of source text; the Python standard library by default")] = None,
    pattern: str = "*.py",
    out: Annotated[Path, typer.Option(help="results and plot go here")] = Path("runs/pretrain_text"),
    context: Annotated[int, typer.Option(help="tokens of a sequence")] = 16384 if ON_GPU else 1024,
    batch: Annotated[int, typer.Option(help="sequences a step")] = 2,
    steps: int = 600 if ON_GPU else 150,
    vocab: Annotated[int, typer.Option(help="tokens of the byte-pair tokenizer, trained on the spot")] = 8192
    if ON_GPU
    else 2048,
    dim: int = 512 if ON_GPU else 128,
    layers: int = 6,
    heads: int = 8 if ON_GPU else 4,
    window: Annotated[int, typer.Option(help="positions that a sliding-window layer sees")] = 256 if ON_GPU else 64,
    global_every: Annotated[int, typer.Option(help="every n-th layer of the mixed stack is token-keyed")] = 3,
    decay: Annotated[str, typer.Option(help="of the token-keyed layers: none, alibi or learned")] = "none",
    learning_rate: float = 1e-3,
    evaluations: Annotated[int, typer.Option(help="how often the held-out text is looked at")] = 10,
    validation: Annotated[int, typer.Option(help="held-out sequences per look")] = 8,
    device: str = "cuda" if ON_GPU else "cpu",
) -> None:
    """Train the three models, the last two twice, and report."""
    train_files, held_files = split_files(source_files(folder, pattern))
    CONSOLE.print(f"{len(train_files)} files to train on, {len(held_files)} held out; training the tokenizer")
    tokenizer = train_tokenizer(train_files, vocab)
    stream, held_out = TokenStream.of(train_files, tokenizer), TokenStream.of(held_files, tokenizer)
    first = next(held_out.in_order(context), None)
    if first is None:
        raise ValueError(
            f"the held-out text has {held_out.ids.numel()} tokens, context is {context}; pass a shorter one"
        )
    ratio = context / first.unique().numel()
    CONSOLE.print(
        f"{stream.ids.numel():,} training tokens, {held_out.ids.numel():,} held out; L/U at {context}: {ratio:.1f}"
    )
    validation = min(validation, (held_out.ids.numel() - 1) // context)
    CONSOLE.print(f"validation on {validation} held-out sequence(s) of {context} tokens")
    settings = Settings(
        context,
        batch,
        steps,
        max(1, steps // evaluations),
        validation,
        learning_rate,
        torch.device(device),
        device != "cpu",
    )
    curves: list[Curve] = []
    timed: list[Curve] = []
    for name, every, width in (("rotary", 0, None), ("mixed", global_every, window), ("window", 0, window)):
        config = MixedDecoderConfig(
            stream.vocab_size,
            dim,
            layers,
            heads,
            global_every=every,
            window=width,
            decay=decay,  # type: ignore[arg-type]
        )
        curves.append(train(name, config, stream, held_out, settings))
        fitting = max(1, round(curves[0].seconds / statistics.median(curves[-1].step_seconds)))
        same = len(curves) == 1 or fitting == steps
        longer = replace(settings, steps=fitting, evaluate_every=max(1, fitting // evaluations))
        timed.append(curves[-1] if same else train(f"{name}, equal time", config, stream, held_out, longer))
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    conditions = (
        f"{steps} steps of {batch} x {context} tokens, {layers} layers, dim {dim}, window {window}, global every {global_every} "
        f"(validation on {validation} sequences) "
        f"(decay {decay}); torch {torch.__version__}, {where}"
    )
    report(curves, timed, ratio, conditions, out)


if __name__ == "__main__":
    typer.run(main)
