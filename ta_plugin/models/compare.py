"""Tokenized against plain attention on one model's trained weights: the same batches, forward and backward, in one run."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ta_plugin.data.batches import Batch
from ta_plugin.models.recommender import SequenceRecommender
from ta_plugin.models.trainer import RecommenderTrainer
from ta_plugin.parallel import exchange_header
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class Measured:
    """One way of computing the same logits.

    tokens_per_second: history events of all ranks over the time of forward and backward
    bytes_sent:        what all ranks sent each other per step, counted at the collectives' buffers, forward and backward
    peak_memory:       bytes that a step takes on top of what is in use before it, the largest of the ranks: resident on the CPU
                       (Linux with glibc), allocated on CUDA; None where that cannot be read
    """

    tokens_per_second: float
    bytes_sent: float
    peak_memory: int | None


@dataclass(frozen=True)
class Comparison:
    """tokenized and plain, and the largest difference of a logit between them; occurrences per distinct row of the batches."""

    tokenized: Measured
    plain: Measured
    largest_difference: float
    largest_logit: float
    occurrences_per_row: float


def compare(trainer: RecommenderTrainer, steps: int = 6) -> Comparison:
    """Run `steps` training batches both ways, taking turns, and count. Parameters are left as they are. Collective."""
    plain_config = replace(trainer.config, strategy="positions")
    plain = SequenceRecommender(plain_config, trainer.table, group=trainer.group, nranks=trainer.group.size)
    plain.load_state_dict(trainer.model.state_dict())
    plain.to(trainer.group.device)
    batches = [trainer.batch(step) for step in range(steps + 1)]  # the first warms up and is not counted
    models = {"tokenized": trainer.model, "plain": plain}
    seconds, sent, peaks = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    difference, largest = 0.0, 0.0
    for number, batch in enumerate(batches):
        logits: dict[str, Tensor] = {}
        for name, model in models.items():
            exchange_header(trainer.everybody, [])  # ranks start together
            trainer.group.traffic.reset()
            in_use = _start_peak(trainer.group.device)
            started = time.perf_counter()
            logits[name] = _forward_backward(trainer, model, batch)
            if number:
                seconds[name] += time.perf_counter() - started
                sent[name] += trainer.group.traffic.total_bytes()
                peaks[name] = max(peaks[name], _peak(trainer.group.device) - in_use if in_use else 0)
        difference = max(difference, float((logits["tokenized"] - logits["plain"]).abs().max()))
        largest = max(largest, float(logits["plain"].abs().max()))
    events = sum(int(batch.lengths.sum()) for batch in batches[1:])
    rows = sum(_distinct_rows(trainer.tokens_of(batch), batch.lengths) for batch in batches[1:])
    scaled = [int(1e9 * difference), int(1e9 * largest), events, rows]
    scaled += [int(1e6 * seconds[n]) for n in models] + [sent[n] for n in models] + [peaks[n] for n in models]
    ranks = exchange_header(trainer.everybody, scaled)
    total = [sum(rank[i] for rank in ranks) for i in range(len(scaled))]
    worst = [max(rank[i] for rank in ranks) for i in range(len(scaled))]
    measured = [
        Measured(total[2] / (worst[4 + i] / 1e6), total[6 + i] / steps, worst[8 + i] or None)
        for i in range(len(models))
    ]
    return Comparison(measured[0], measured[1], worst[0] / 1e9, worst[1] / 1e9, total[2] / max(total[3], 1))


def _forward_backward(trainer: RecommenderTrainer, model: SequenceRecommender, batch: Batch) -> Tensor:
    logits = model(trainer.tokens_of(batch), batch.lengths, batch.ages, batch.actions, batch.targets)
    logits.square().mean().backward()
    model.zero_grad(set_to_none=True)
    trainer.table.zero_grad()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return logits.detach()


def _distinct_rows(tokens: Tensor, lengths: Tensor) -> int:
    return UniqueSpace.from_padded(tokens, lengths).num_rows


def _start_peak(device: torch.device) -> int:
    """Begin to watch memory; returns what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    control = Path("/proc/self/clear_refs")
    if not control.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or the process would reuse it unseen
    control.write_text("5")  # Linux: forget the resident high-water mark
    return _resident("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)
