"""Cross-entropy of labelled occurrences, computed once per distinct (row, label) pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin.checks import check_tensor
from ta_plugin.megatron.plan import RowLayout
from ta_plugin.routing import Route
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class LabelledRows:
    """The distinct (row, label) pairs of this rank's rows; at least one, so that every rank reaches every collective.

    rows:   (P,) int64, within this rank's part of the layout, or position slots
    labels: (P,) int64
    counts: (P,) float32, how many occurrences share the pair
    """

    rows: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor, layout: RowLayout, vocab_size: int) -> LabelledRows:
        """Labels (B, L) int64, negative where there is none, that `check_labels` lets pass."""
        packed = layout.space.pack(labels)
        row = layout.space.inverse - layout.first
        keep = (packed >= 0) & (row >= 0) & (row < layout.rows)
        pairs = UniqueSpace.from_packed(row[keep] * vocab_size + packed[keep])
        return cls._or_one(pairs.tokens // vocab_size, pairs.tokens % vocab_size, pairs.counts)

    @classmethod
    def of_chunks(cls, labels: Tensor, layout: RowLayout, vocab_size: int) -> LabelledRows:
        """Labels (B, L) int64 of this rank's chunks, at the owners of the rows they belong to. Collective over context parallelism.

        Distinct pairs travel, three integers each; hidden rows stay where they are.
        """
        owned = layout.owned
        assert owned is not None
        reader, group = owned.reader, owned.group
        packed = reader.pack(labels)
        keep = packed >= 0
        pairs = UniqueSpace.from_packed(reader.inverse[keep] * vocab_size + packed[keep])
        row = pairs.tokens // vocab_size
        here = torch.arange(layout.rows, device=labels.device)
        there = owned.numbers_to_readers(here, "labels.rows")[row]
        route = Route.build(owned.owner_of_reader_rows()[row], pairs.cu_seqlens, [1] * group.size, group)
        mine = route.to_owners(torch.stack([there, pairs.tokens % vocab_size, pairs.counts], 1), "labels")
        merged = UniqueSpace.from_packed(mine[:, 0] * vocab_size + mine[:, 1])
        counts = torch.zeros_like(merged.counts).index_add(0, merged.inverse, mine[:, 2])
        return cls._or_one(merged.tokens // vocab_size, merged.tokens % vocab_size, counts)

    @classmethod
    def of_positions(cls, labels: Tensor, layout: RowLayout, vocab_size: int) -> LabelledRows:
        """The same for hidden states over positions (L, B): each labelled occurrence by itself; rows count l * B + b."""
        length = torch.arange(labels.shape[1], device=labels.device)
        keep = (labels >= 0) & (length < layout.space.cu_occurrences.diff()[:, None])
        slots = keep.T.reshape(-1).nonzero().squeeze(1)
        values = labels.T.reshape(-1)[slots]
        return cls._or_one(slots, values, torch.ones_like(values))

    @classmethod
    def _or_one(cls, rows: Tensor, labels: Tensor, counts: Tensor) -> LabelledRows:
        if rows.numel() == 0:
            rows, labels, counts = rows.new_zeros(1), labels.new_zeros(1), counts.new_zeros(1)
        return cls(rows, labels, counts.float())


def count_labels(labels: Tensor, lengths: Tensor) -> Tensor:
    """How many occurrences are labelled, a scalar int: labels (B, L) int64 not negative, within lengths (B,)."""
    inside = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    return ((labels >= 0) & inside).sum().int()


LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def loss_function(
    labels: Tensor, lengths: Tensor, *, context_parallel_size: int = 1, chunks_on: dist.ProcessGroup | None = None
) -> LossFunction:
    """What a forward step returns beside the model's losses (P,): Megatron's three-part loss.

    Gives the sum of losses and the number of labels, of which Megatron takes the quotient (per microbatch, or over the global
    batch with calculate_per_token_loss), and {"lm loss": (sum, count)} to report. Under context parallelism each rank holds the
    losses of its rows but knows the count of all, so the sum is scaled by the size that Megatron will divide by.

    chunks_on: layout "sequence": the context-parallel group, whose ranks each hold the labels of their chunks. Collective then
    """
    total = count_labels(labels, lengths)
    if chunks_on is not None:
        dist.all_reduce(total, group=chunks_on)

    def reduce(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mine = losses.sum()
        report = torch.stack([mine.detach(), total.to(mine) / context_parallel_size])
        return mine * context_parallel_size, total, {"lm loss": report}

    return reduce


def check_labels(labels: Tensor, batch: int, length: int | None, vocab_size: int) -> None:
    """Labels (B, L) int64 below vocab_size. Raises ValueError."""
    check_tensor("labels", labels)
    expected = (batch, length)
    if labels.dtype != torch.int64 or tuple(labels.shape) != expected:
        raise ValueError(f"labels is {labels.dtype} of shape {tuple(labels.shape)}; pass int64 of shape {expected}")
    if labels.numel() and int(labels.max()) >= vocab_size:
        raise ValueError(
            f"labels holds {int(labels.max())}, but the output has {vocab_size} ids; labels must lie below it"
        )
