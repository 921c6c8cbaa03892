"""Losses under sequence parallelism, where what the engine does with gradients depends on its ZeRO stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ta_plugin.deepspeed.groups import sequence_parallel_sum


def sequence_parallel_loss(engine: Any, loss: Tensor) -> Tensor:
    """What to pass to `engine.backward` when `loss` () is the mean over this rank's chunk of each sequence, chunks of equal size.

    Makes gradients those of the mean over the whole sequences at every stage: the engine sums them over the sequence-parallel
    ranks at some stages and averages them at others.
    """
    return loss / sequence_parallel_sum(engine)
