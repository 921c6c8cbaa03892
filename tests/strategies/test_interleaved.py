"""Models with different groups live in one process and interleave."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention, create_ssp_group

BATCH, LENGTH, VOCAB, EMBED = 2, 6, 12, 8


def model(group: SSPGroup | None, strategy: str) -> tuple[TokenizedAttention, nn.Embedding]:
    torch.manual_seed(0)
    table = nn.Embedding(VOCAB, EMBED, dtype=torch.float64)
    maps = {name: nn.Linear(EMBED, EMBED, dtype=torch.float64) for name in ("query", "key", "value")}
    size = 1 if group is None else group.size
    return TokenizedAttention(BATCH, LENGTH, size, table, group=group, num_heads=2, strategy=strategy, **maps), table


def batch(rank: int, which: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + which)
    return {
        "tokens": torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator),
        "lengths": torch.randint(0, LENGTH + 1, (BATCH,), generator=generator),
        "targets": torch.randint(0, VOCAB, (BATCH, 2), generator=generator),
    }


def summed_gradient(table: nn.Embedding) -> Tensor:
    """Over all ranks: each owner holds the part of its rows."""
    grad = torch.zeros_like(table.weight) if table.weight.grad is None else table.weight.grad.clone()
    dist.all_reduce(grad)
    return grad


def interleave(strategy: str, one_backward: bool) -> None:
    rank = dist.get_rank()
    groups = [SSPGroup(dist.group.WORLD), create_ssp_group(2), None]
    models = [model(g, strategy if g is not None else "gather") for g in groups]
    outs = [m(**batch(rank, 0)) for m, _ in models]
    seconds = [m(**batch(rank, 1)) for m, _ in reversed(models)][::-1]
    for out, second in zip(outs, seconds, strict=True):  # every group computes what one rank alone computes
        torch.testing.assert_close(out, outs[2], rtol=0, atol=1e-12)
        torch.testing.assert_close(second, seconds[2], rtol=0, atol=1e-12)
    losses = [a.square().sum() + b.square().sum() for a, b in zip(outs, seconds, strict=True)]
    if one_backward:
        torch.stack(losses).sum().backward()
    else:
        for loss in (losses[1], losses[2], losses[0]):
            loss.backward()
    grads = [summed_gradient(table) for _, table in models]
    for grad in grads[:2]:
        torch.testing.assert_close(grad, grads[2], rtol=0, atol=1e-11)
    world, pair = groups[0], groups[1]
    assert world is not None
    assert pair is not None
    assert world.traffic.elements["targets.ids"] > 0
    assert world.traffic.elements["header"] == 3 * pair.traffic.elements["header"]  # 3 others, and 1 other


def test_two_models_with_different_groups_interleave(rank_pools: Any) -> None:
    for strategy in ("gather", "owner", "auto"):
        for one_backward in (False, True):
            rank_pools(4).run(interleave, strategy, one_backward)
