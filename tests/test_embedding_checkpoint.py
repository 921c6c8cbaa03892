"""Tables saved by torch.distributed.checkpoint on some ranks and loaded on more or fewer: training goes on unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ta_plugin import ShardedTokenEmbedding, SSPGroup, UniqueSpace, create_ssp_group
from ta_plugin.embedding import lookup
from ta_plugin.ops import expand
from ta_plugin.routing import Route
from ta_plugin.row_optimizers import SGD, Adagrad, LazyAdam, RowWiseAdagrad

DIM, PARTS = 4, 4
OPTIMIZERS = {"sgd": SGD, "adagrad": Adagrad, "rowwise": RowWiseAdagrad, "adam": LazyAdam}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def build(optimizer: str, vocab: int, ssp: int, seed: int) -> ShardedTokenEmbedding:
    group = SSPGroup(None)
    if dist.is_initialized():
        group = create_ssp_group(ssp) if ssp else SSPGroup(dist.group.WORLD)
    rule = OPTIMIZERS[optimizer](lr=0.1)
    return ShardedTokenEmbedding(vocab, DIM, group, optimizer=rule, seed=seed, dtype=torch.float64)


def train(table: ShardedTokenEmbedding, steps: range) -> Tensor:
    """The same global batch however many ranks share it: PARTS parts, dealt out."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        for part in range(rank, PARTS, ranks):
            generator = torch.Generator().manual_seed(100 * step + part)
            ids = torch.randint(0, table.vocab_size, (9,), generator=generator)
            coefficients = torch.randn(9, DIM, generator=generator, dtype=torch.float64)
            space = UniqueSpace.from_packed(ids)
            route = Route.build(table.owner_of(space.tokens), space.cu_seqlens, [1] * table.group.size, table.group)
            rows = expand(lookup(space.tokens, route, table, "ids"), space.segments)
            ((rows * coefficients).sum() * ranks / PARTS).backward()
        table.step()
    return table.to_dense()


def save(path: str, optimizer: str, vocab: int, ssp: int) -> Tensor:
    """Three steps, save, and two more: what every loader must end with."""
    table = build(optimizer, vocab, ssp, seed=1)
    train(table, range(3))
    dcp.save({"model": table.state_dict()}, checkpoint_id=path)
    return train(table, range(3, 5))


def load(path: str, optimizer: str, vocab: int, ssp: int) -> Tensor:
    table = build(optimizer, vocab, ssp, seed=2)
    state = {"model": table.state_dict()}
    dcp.load(state, checkpoint_id=path)
    table.load_state_dict(state["model"])
    assert int(table.steps) == 3
    return train(table, range(3, 5))


def on_ranks(rank_pools: Any, ranks: int, function: Any, *args: Any) -> list[Tensor]:
    return [function(*args)] if ranks == 1 else rank_pools(ranks).run(function, *args)


CHANGES = [((4, 0), (2, 0)), ((4, 0), (1, 0)), ((1, 0), (4, 0)), ((4, 2), (4, 0)), ((4, 0), (4, 2)), ((2, 0), (2, 0))]


@pytest.mark.parametrize(
    ("source", "target"), CHANGES, ids=lambda x: f"{x[0]}" + (f"as{x[1]}x{x[0] // x[1]}" if x[1] else "")
)
@pytest.mark.parametrize(("optimizer", "vocab"), [("adam", 11), ("rowwise", 11), ("adagrad", 3)])
def test_the_next_two_steps_match_on_another_number_of_ranks(
    rank_pools: Any, tmp_path: Path, source: tuple[int, int], target: tuple[int, int], optimizer: str, vocab: int
) -> None:
    path = str(tmp_path / "checkpoint")
    saved = on_ranks(rank_pools, source[0], save, path, optimizer, vocab, source[1])
    for table in on_ranks(rank_pools, target[0], load, path, optimizer, vocab, target[1]):
        torch.testing.assert_close(table, saved[0], rtol=0, atol=1e-12)
        if source == target:
            assert torch.equal(table, saved[0])


def test_a_plain_state_dict_restores_one_rank() -> None:
    table = build("adam", 11, 0, seed=1)
    train(table, range(3))
    state = {name: value.clone() for name, value in table.state_dict().items()}
    expected = train(table, range(3, 5))
    other = build("adam", 11, 0, seed=2)
    other.load_state_dict(state)
    assert torch.equal(train(other, range(3, 5)), expected)


def test_a_missing_entry_is_reported() -> None:
    table = build("adam", 11, 0, seed=1)
    state = table.state_dict()
    del state["optimizer.exp_avg"]
    with pytest.raises(RuntimeError, match=r"Missing key.*optimizer\.exp_avg"):
        table.load_state_dict(state)


def loads_what_one_rank_saved() -> None:
    whole = ShardedTokenEmbedding(7, 3)
    part = ShardedTokenEmbedding(7, 3, SSPGroup(dist.group.WORLD))
    with pytest.raises(
        RuntimeError, match=rf"weight has shape \(7, 3\), but rank {part.group.rank} of 2 holds \([34], 3\)"
    ):
        part.load_state_dict(whole.state_dict())


def test_a_plain_state_dict_of_another_number_of_ranks_is_named(rank_pools: Any) -> None:
    rank_pools(2).run(loads_what_one_rank_saved)
