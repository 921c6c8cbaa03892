"""One step's microbatches, checked on every rank before the schedule begins, so that no pipeline stage waits for one that raised."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin.checks import check_tensor, check_tokens
from ta_plugin.megatron.loss import check_labels
from ta_plugin.parallel import SSPGroup, exchange_header

Microbatch = tuple[Tensor, Tensor, Tensor | None]


def check_microbatches(
    microbatches: Sequence[Microbatch], vocab_size: int, *, group: dist.ProcessGroup | None = None
) -> None:
    """What is wrong with a microbatch of one rank, or with their number, raises the same ValueError on every rank. Collective.

    microbatches: (tokens (B, L) int64, lengths (B,) int64, labels (B, L) int64 or None) that this rank will feed the schedule with;
                  tokens and lengths on every pipeline stage, labels at least on the last
    group:        the ranks that wait for each other in a step: all of them by default

    `TokenizedModel` checks each microbatch where it is read and raises on the ranks that exchange rows with it there. A pipeline's stages
    have no such exchange (one per microbatch would hold up the schedule), so under pipeline parallelism call this once per step.
    """
    error = None
    for number, (tokens, lengths, labels) in enumerate(microbatches):
        try:
            check_tensor("tokens", tokens)
            check_tokens("tokens", tokens, tokens.device, vocab_size, lengths)
            if labels is not None:
                check_labels(labels, tokens.shape[0], tokens.shape[1], vocab_size)
        except ValueError as failure:
            error = ValueError(f"microbatch {number}: {failure}")
            break
    everybody = SSPGroup(group if group is not None or not dist.is_initialized() else dist.group.WORLD)
    counts = exchange_header(everybody, [len(microbatches)], error)
    for rank, (count,) in enumerate(counts):
        if count != counts[0][0]:
            raise ValueError(
                f"rank 0 has {counts[0][0]} microbatches, rank {rank} of {everybody.size} {count}; give every rank as many"
            )


class CheckedMicrobatches:
    """A rank's training microbatches for a loop that is not one's own, as Megatron's `pretrain()`: an iterator, and a hook that checks.

    The schedules call `config.no_sync_func` before anything moves between stages, so with

        checked = CheckedMicrobatches(batches, vocab_size, get_num_microbatches)
        config.no_sync_func = checked.begin_step

    on every rank a step's microbatches are read ahead and given to `check_microbatches`. Under `pretrain()` return it from a provider of
    data sets whose is_distributed is True, with `--dataloader-type external`. Not for interleaved stages, whose schedule calls the hook
    again within a step, nor beside overlap_grad_reduce, which takes the hook's place; evaluation (without gradients) is not checked.

    microbatches: an iterator over what the forward step reads, endless or as long on every rank
    number:       how many a step takes, when it begins
    read:         (tokens, lengths, labels) of one of them, as `check_microbatches` wants them; by default it is that
    """

    def __init__(
        self,
        microbatches: Iterator[Any],
        vocab_size: int,
        number: Callable[[], int],
        *,
        read: Callable[[Any], Microbatch] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.microbatches, self.vocab_size, self.number, self.group = microbatches, vocab_size, number, group
        self.read = read or (lambda microbatch: microbatch)
        self._ahead: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._ahead.popleft() if self._ahead else next(self.microbatches)

    def begin_step(self) -> AbstractContextManager[None]:
        """Check the next step's microbatches, which are dropped where that raises. Collective."""
        if torch.is_grad_enabled() and not self._ahead:
            step = list(islice(self.microbatches, self.number()))
            check_microbatches([self.read(each) for each in step], self.vocab_size, group=self.group)
            self._ahead.extend(step)
        return nullcontext()
