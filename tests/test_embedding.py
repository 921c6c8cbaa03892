"""ShardedTokenEmbedding on 1, 2 and 4 ranks against nn.Embedding with torch's optimizers on one process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ON_GPUS
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, SSPGroup, UniqueSpace, clip_grad_norm_, create_ssp_group
from ta_plugin.embedding import embed_owned, lookup
from ta_plugin.ops import expand
from ta_plugin.parallel import average_gradients
from ta_plugin.routing import Route
from ta_plugin.row_optimizers import SGD, Adagrad, LazyAdam

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant")  # torch.optim.Adagrad builds sparse tensors
DIM = 4
OPTIMIZERS: dict[str, Any] = {
    "sgd": (SGD(lr=0.5), lambda p: torch.optim.SGD(p, lr=0.5)),
    "adagrad": (Adagrad(lr=0.2), lambda p: torch.optim.Adagrad(p, lr=0.2)),
    "adam": (LazyAdam(lr=0.05), lambda p: torch.optim.SparseAdam(p, lr=0.05)),
}


def embed(table: ShardedTokenEmbedding, ids: Tensor) -> Tensor:
    """Rows of ids (n,) at their reader."""
    space = UniqueSpace.from_packed(ids)
    sizes = [1] * table.group.size
    route = Route.build(table.owner_of(space.tokens), space.cu_seqlens, sizes, table.group)
    return expand(lookup(space.tokens, route, table, "ids"), space.segments)


@dataclass(frozen=True)
class Training:
    """A short training, equal on one process and on many."""

    optimizer: str
    vocab: int = 11
    steps: int = 3
    backwards: int = 1  # accumulated before each step
    ssp: int = 0  # ranks in an SSP group; 0: all
    max_norm: float | None = None


def data_of(case: Training, rank: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Ids with repeats, and what their rows are multiplied by; rank 1 has none in the second step."""
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + micro)
    size = 0 if (rank, step) == (1, 1) else 9
    return (
        torch.randint(0, case.vocab, (size,), generator=generator),
        torch.randn(size, DIM, generator=generator, dtype=torch.float64),
    )


def loss_of(rows: Tensor, dense: nn.Linear, coefficients: Tensor) -> Tensor:
    return (dense(rows) * coefficients).sum() + rows.square().sum()


def dense_layer() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(DIM, DIM, dtype=torch.float64)


def train_one_process(case: Training, weight: Tensor, ranks: int) -> tuple[Tensor, list[Tensor]]:
    """torch alone: the mean over ranks of their losses."""
    clipped = case.max_norm is not None  # torch clips no sparse gradient; on SGD and Adagrad a dense one does the same
    table = nn.Embedding(*weight.shape, dtype=torch.float64, sparse=not clipped)
    table.weight.data.copy_(weight)
    dense = dense_layer()
    optimizer = OPTIMIZERS[case.optimizer][1]([table.weight])
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    norms = []
    for step in range(case.steps):
        for micro in range(case.backwards):
            for rank in range(ranks):
                ids, coefficients = data_of(case, rank, step, micro)
                (loss_of(table(ids), dense, coefficients) / ranks).backward()
        if case.max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_([*dense.parameters(), table.weight], case.max_norm))
        for each in (optimizer, dense_optimizer):
            each.step()
            each.zero_grad()
    return table.weight.detach(), [*norms, *dense.parameters()]


def check_training(case: Training) -> Tensor:
    distributed = dist.is_initialized()
    group = create_ssp_group(case.ssp) if case.ssp else SSPGroup(dist.group.WORLD if distributed else None)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    optimizer = OPTIMIZERS[case.optimizer][0]
    table = ShardedTokenEmbedding(case.vocab, DIM, group, optimizer=optimizer, dtype=torch.float64)
    dense = dense_layer()
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    expected, expected_dense = train_one_process(case, table.to_dense(), ranks)
    norms = []
    for step in range(case.steps):
        for micro in range(case.backwards):
            ids, coefficients = data_of(case, rank, step, micro)
            loss_of(embed(table, ids), dense, coefficients).backward()
        average_gradients(dense.parameters(), group)
        scale: Tensor | float = 1.0
        if case.max_norm is not None:
            norm, scale = clip_grad_norm_(dense.parameters(), [table], case.max_norm)
            norms.append(norm)
        table.step(scale)
        dense_optimizer.step()
        dense_optimizer.zero_grad()
    torch.testing.assert_close(table.to_dense(), expected, rtol=0, atol=1e-12)
    for mine, theirs in zip([*norms, *dense.parameters()], expected_dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    return table.to_dense()


def initial_table(vocab: int) -> Tensor:
    return ShardedTokenEmbedding(vocab, DIM, SSPGroup(dist.group.WORLD), seed=3).to_dense()


def rows_of_everything(vocab: int) -> list[int]:
    """A table whose row says its id; every rank reads every id. Returns how many rows this rank holds."""
    table = ShardedTokenEmbedding(vocab, 2, SSPGroup(dist.group.WORLD), dtype=torch.float64)
    ids = torch.arange(vocab)
    table.load_dense(torch.stack([ids, -ids], 1).double())
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(table.group.rank))
    assert torch.equal(embed(table, order), torch.stack([order, -order], 1).double())
    assert torch.equal(table.to_dense(), torch.stack([ids, -ids], 1).double())
    return [table.rows.shape[0]]


def accumulates_nothing_twice() -> None:
    table = ShardedTokenEmbedding(11, DIM, SSPGroup(dist.group.WORLD), optimizer=SGD(lr=1.0), dtype=torch.float64)
    before = table.to_dense()
    embed(table, torch.tensor([1, 1, 2])).sum().backward()
    table.zero_grad()  # a skipped step
    table.step()
    assert torch.equal(table.to_dense(), before)
    embed(table, torch.tensor([1, 1, 2])).sum().backward()
    table.reduce_gradients()
    table.reduce_gradients()
    table.grad_norm_squared()
    table.step()
    change = (table.to_dense() - before)[:, 0].tolist()
    assert change == pytest.approx([0, -2, -1, *[0] * 8], abs=1e-12)  # each rank's two and one, averaged
    table.step()
    assert (table.to_dense() - before)[:, 0].tolist() == change


@pytest.mark.parametrize("vocab", [3, 64, 5001])  # fewer rows than ranks, and more than one random stream
def test_rows_do_not_depend_on_the_number_of_ranks(rank_pools: Any, vocab: int) -> None:
    alone = ShardedTokenEmbedding(vocab, DIM, seed=3).to_dense()
    assert alone.unique(dim=0).shape[0] == vocab
    for ranks in (2, 4):
        for table in rank_pools(ranks).run(initial_table, vocab):
            assert torch.equal(table, alone)
    assert not torch.equal(ShardedTokenEmbedding(vocab, DIM, seed=4).to_dense(), alone)


@pytest.mark.parametrize(
    ("vocab", "held"), [(1, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (5, [2, 2, 1, 0]), (10, [3, 3, 3, 1])]
)
def test_every_rank_reads_every_id_whatever_the_vocabulary(rank_pools: Any, vocab: int, held: list[int]) -> None:
    assert [n for (n,) in rank_pools(4).run(rows_of_everything, vocab)] == held


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("backwards", [1, 2])
def test_steps_equal_torch_on_one_rank(optimizer: str, backwards: int) -> None:
    check_training(Training(optimizer, backwards=backwards))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_equal_torch_on_ranks(rank_pools: Any, ranks: int, optimizer: str) -> None:
    rank_pools(ranks).run(check_training, Training(optimizer))
    rank_pools(ranks).run(check_training, Training(optimizer, backwards=2, vocab=3))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("ssp", [1, 2])
def test_steps_equal_torch_with_replicas(rank_pools: Any, ssp: int, optimizer: str) -> None:
    tables = rank_pools(4).run(check_training, Training(optimizer, backwards=2, ssp=ssp))
    assert all(torch.equal(table, tables[0]) for table in tables)  # replicas stay equal bit for bit


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("max_norm", [0.7, 1e4])
def test_clipping_equals_torch(rank_pools: Any, optimizer: str, max_norm: float) -> None:
    check_training(Training(optimizer, max_norm=max_norm))
    rank_pools(4).run(check_training, Training(optimizer, max_norm=max_norm, backwards=2))
    rank_pools(4).run(check_training, Training(optimizer, max_norm=max_norm, ssp=2))


def test_a_skipped_step_and_repeated_reductions_change_nothing(rank_pools: Any) -> None:
    rank_pools(4).run(accumulates_nothing_twice)


def test_backward_between_reduction_and_step_is_refused() -> None:
    table = ShardedTokenEmbedding(5, DIM)
    embed(table, torch.tensor([1])).sum().backward()
    table.reduce_gradients()
    rows = embed(table, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="finish the step first"):
        rows.sum().backward()


def test_no_ids_give_no_rows_and_still_run_backward() -> None:
    table = ShardedTokenEmbedding(5, DIM)
    rows = table(torch.empty(0, dtype=torch.int64))
    assert rows.shape == (0, DIM)
    assert rows.requires_grad
    rows.sum().backward()
    table.step()


def test_the_table_is_no_parameter_and_follows_the_module() -> None:
    model = nn.ModuleList([ShardedTokenEmbedding(5, DIM)])
    assert not list(model.parameters())
    table = model.double()[0]
    assert isinstance(table, ShardedTokenEmbedding)
    assert table.rows.dtype == torch.float64
    assert table.state["sum"].dtype == torch.float64


def test_a_table_of_low_precision_trains() -> None:
    table = ShardedTokenEmbedding(5, DIM, dtype=torch.bfloat16)
    before = table.rows.clone()
    embed(table, torch.tensor([1, 1])).float().sum().backward()
    table.step()
    changed = (table.rows != before).any(1)
    assert table.owners.ids_of_rows(changed.nonzero().squeeze(1)).tolist() == [1]


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda ids: torch.zeros(ids.numel()), "(2,)"),
        (lambda ids: torch.zeros(3, 4), "(3, 4)"),
        (lambda ids: torch.zeros(ids.numel(), 4).long(), "torch.int64"),
    ],
)
def test_an_embedding_fn_that_returns_something_else_is_named(function: Any, got: str) -> None:
    with pytest.raises(ValueError, match="embedding_fn returned") as error:
        embed_owned(torch.tensor([1, 2]), function)
    assert got in str(error.value)


def test_a_whole_table_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\); pass \(5, 4\)"):
        ShardedTokenEmbedding(5, DIM).load_dense(torch.zeros(4, 4))


def regrouped() -> None:
    group = SSPGroup(dist.group.WORLD)
    whole = ShardedTokenEmbedding(11, DIM, seed=3, optimizer=Adagrad(), dtype=torch.float64)
    built = ShardedTokenEmbedding(11, DIM, group, seed=3, optimizer=Adagrad(), dtype=torch.float64)
    whole.regroup(group)
    for table in (whole, built):
        for step in range(2):
            ids, coefficients = data_of(Training("adagrad"), group.rank, step, 0)
            (embed(table, ids) * coefficients).sum().backward()
            table.step()
    assert torch.equal(whole.rows, built.rows)
    assert torch.equal(whole.state["sum"], built.state["sum"])
    try:
        built.regroup(group)
    except ValueError as failure:
        assert "sharded over 4 ranks already" in str(failure)
    else:
        raise AssertionError("not refused")


def test_a_table_built_whole_moves_onto_a_group(rank_pools: Any) -> None:
    rank_pools(4).run(regrouped)


def test_regrouping_moves_rows_and_state_to_where_the_group_exchanges() -> None:
    """A model is built on the CPU, and an engine moves its parameters; a table's rows are none."""
    table = ShardedTokenEmbedding(8, 2, optimizer=LazyAdam(1e-3))
    table.regroup(SSPGroup(None, device="meta"))
    assert {tensor.device.type for tensor in (table.rows, *table.state.values())} == {"meta"}


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (torch.tensor([1, 5]), "ids[1] is 5, but vocab_size is 5; pass ids of 0 or more, below it"),
        (torch.tensor([4, 2**62]), "ids[1] is 4611686018427387904, but vocab_size is 5"),
        (torch.tensor([-1, 5]), "ids[0] is -1, but vocab_size is 5"),
        (torch.tensor([1, 2], dtype=torch.int32), "ids is torch.int32; pass int64 (`ids.long()`)"),
        (torch.tensor([[1, 2]]), "ids has shape (1, 2); pass 1 dimension"),
        ([1, 2], "ids is a list; pass a tensor"),
        (torch.tensor([1, 2], device="meta"), "ids is on meta, the table on cpu; move one to the other"),
    ],
)
def test_ids_that_a_table_cannot_hold_are_named(ids: Any, names: str) -> None:
    table = ShardedTokenEmbedding(5, DIM)
    with pytest.raises(ValueError, match=re.escape(names)):
        table(ids)
    assert not table.holds_gradients


def asked_for_the_others_ids() -> str:
    table = ShardedTokenEmbedding(11, DIM, SSPGroup(dist.group.WORLD))
    ids = torch.arange(11)
    theirs = ids[table.owner_of(ids) != table.group.rank]
    try:
        table(theirs[:1])
    except ValueError as error:
        return str(error).replace(f"is {int(theirs[0])},", "is its id,")
    return ""


@pytest.mark.skipif(ON_GPUS, reason="ends the process there: tests/test_cuda.py")
def test_a_table_that_is_asked_for_what_another_rank_holds_names_that_rank(rank_pools: Any) -> None:
    for rank, text in enumerate(rank_pools(2).run(asked_for_the_others_ids)):
        assert text == (
            f"ids[0] is its id, which rank {1 - rank} of 2 owns and not rank {rank}; ask for it with TokenizedAttention.embed, "
            "which goes to the owners"
        )


def routes_what_nobody_owns(wrong: int) -> str:
    """One rank asks for an id outside the vocabulary; afterwards the group works on."""
    table = ShardedTokenEmbedding(11, DIM, SSPGroup(dist.group.WORLD))
    ids, text = torch.tensor([3, 4, 3]), ""
    try:
        embed(table, torch.tensor([3, wrong, 3]) if table.group.rank == 1 else ids)
    except ValueError as error:
        text = str(error)
    assert torch.equal(embed(table, ids), table.to_dense()[ids])
    return text


@pytest.mark.parametrize("wrong", [11, 10**12, -1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_id_that_nobody_owns_raises_on_every_rank(rank_pools: Any, ranks: int, wrong: int) -> None:
    for text in rank_pools(ranks).run(routes_what_nobody_owns, wrong):
        assert text.startswith(f"rank 1 of {ranks}: owner[1] is -1; it must lie in [0, {ranks})"), text
        assert text.endswith("pass ids of 0 or more, below vocab_size")
