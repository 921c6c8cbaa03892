"""One step's microbatches, checked on every rank before the schedule begins, so that no pipeline stage waits for one that raised."""

from __future__ import annotations

from collections.abc import Sequence

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
