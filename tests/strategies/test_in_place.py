"""Rows read where they lie: the numbers of a look-up, to the bit, and no look-up."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, SSPGroup, TokenizedAttention
from ta_plugin.beside import Beside
from ta_plugin.embedding import SharedEmbedding
from ta_plugin.ops import load_op
from ta_plugin.routing import HashOwners, PermutedRows
from ta_plugin.strategies.in_place import OwnedTable

B, L, T, V, E, H = 4, 30, 2, 60, 64, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Counted:
    """A table that counts look-ups of many ids, with or without the methods that read in place."""

    def __init__(self, table: ShardedTokenEmbedding, in_place: bool) -> None:
        self.table, self.lookups = table, 0
        self.vocab_size, self.embedding_dim, self.owner_of = V, E, table.owner_of
        if in_place:
            self.in_place, self.record = table.in_place, table.record

    @property
    def trainable(self) -> bool:
        return self.table.trainable

    def __call__(self, ids: Tensor) -> Tensor:
        self.lookups += ids.numel() > B * T
        return self.table(ids)


def build(device: str, dtype: torch.dtype, in_place: bool, **options: Any) -> tuple[TokenizedAttention, Counted]:
    op = load_op("target_attention", device=device)  # type: ignore[arg-type]
    assert op.implementation == "compiled", op.reason
    torch.manual_seed(0)
    table = Counted(ShardedTokenEmbedding(V, E, dtype=dtype, device=device), in_place)
    bias, names = options.pop("bias", False), options.pop("maps", ("query", "key", "value"))
    maps = {name: nn.Linear(E, E, bias=bias) for name in names}
    options = {"strategy": "owner", "num_heads": H, **maps, **options}
    group = SSPGroup(None, device=torch.device(device))
    return TokenizedAttention(B, L, 1, table, group=group, **options).to(device, dtype), table


def batch(device: str, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, V, (B, n), generator=g).to(device) for n in (L, T))
    return {"tokens": tokens, "lengths": torch.tensor([L, 0, 7, L], device=device), "targets": targets}


def results(model: TokenizedAttention, table: Counted, given: dict[str, Tensor]) -> list[Tensor]:
    """Output, gradients of parameters, and of the rows recorded for targets and for keys, each row once in its record."""
    out = model(**given)
    out.float().sin().sum().backward()
    recorded = table.table.take_recorded()
    assert len(recorded) == 2
    dense = [torch.zeros(V, E, dtype=grad.dtype, device=grad.device) for _, grad in recorded]
    for whole, (rows, grad) in zip(dense, recorded, strict=True):
        assert not grad[rows.unique().numel() :].any()  # spare ones of a bounded space
        whole.index_add_(0, rows, grad)
    return [out.detach(), *dense, *(p.grad for p in model.parameters() if p.grad is not None)]


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "absorbed": ({}, 0),
    "bounded": ({"row_bound": B * L + 9, "id_bound": V}, 0),
    "biases": ({"bias": True}, 0),
    "the embedding itself": ({"maps": (), "num_heads": H, "num_kv_heads": 1}, 0),
    "without a normaliser": ({"normaliser": "none", "activation": F.silu}, 0),
    "biases without a normaliser": ({"normaliser": "none", "bias": True}, 1),  # keys need a column more
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_equals_looking_rows_up(case: str, device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs on the CPU")
    options, lookups = CASES[case]
    found = []
    for in_place in (True, False):
        model, table = build(device, dtype, in_place, **options)
        if case == "the embedding itself":
            model.projections.num_heads = model.projections.num_kv_heads = H
        found.append(results(model, table, batch(device)))
        assert table.lookups == (lookups if in_place else 1)
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(ours, exact) for ours, exact in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_rows_reach_their_samples_and_empty_batches_pass(device: str) -> None:
    model, table = build(device, torch.float32, True)
    given = batch(device)
    given["tokens"].fill_(3)
    given["tokens"][2, 1] = 7
    given["targets"].fill_(5)
    table.table.rows[table.table.owners.permute(torch.tensor(7, device=device))] = torch.nan
    assert model(**given).isnan().any(2).any(1).tolist() == [False, False, True, False]
    given["lengths"].zero_()
    out, *_ = results(model, table, given)
    assert not out.any()


def test_frozen_and_shared_tables_and_no_gradients() -> None:
    model, table = build("cpu", torch.float32, True)
    table.table.trainable = False
    model(**batch("cpu")).sum().backward()
    assert not table.table.holds_gradients
    table.table.trainable = True
    with torch.no_grad():
        model(**batch("cpu"))
    assert not table.table.holds_gradients
    model.embedding_fn = SharedEmbedding(table.table)
    model(**batch("cpu")).sum().backward()
    assert table.table.holds_gradients
    assert OwnedTable.of(batch("cpu")["tokens"][0], None, model._parts()).in_place is not None
    table.table.in_place = None  # taken away later, as an engine of another dtype does
    assert OwnedTable.of(batch("cpu")["tokens"][0], None, model._parts()).in_place is None


def test_queries_without_gradients_leave_the_rows_theirs() -> None:
    model, table = build("cpu", torch.float32, True, maps=())
    given = batch("cpu")
    del given["targets"]
    model(**given, queries=torch.randn(B, T, E)).sum().backward()
    ((rows, grad),) = table.table.take_recorded()
    assert bool(grad.any()) and rows.numel() == grad.shape[0]


@pytest.mark.parametrize("device", DEVICES)
def test_too_many_ids_that_are_found_late_are_told_by_the_next_call(device: str) -> None:
    """As while a step is captured: results do not wait for the distinct ids, whose gradients are left out."""
    for ids, right in ((V, True), (3, False)):
        model, table = build(device, torch.float32, True, row_bound=B * L, id_bound=ids, maps=("query",))
        assert model.bounds is not None
        model.bounds.beside = Beside(torch.device(device), lasts=True)
        given = batch(device)
        del given["targets"]  # whose ids are counted before
        given["queries"] = torch.randn(B, T, E, device=device)
        out = model(**given)
        out.sum().backward()
        assert bool(out.isfinite().all())
        ((_, grad),) = table.table.take_recorded()
        assert bool(grad.any()) == right
        given["tokens"] = given["tokens"] % 3
        assert bool(model(**given).isfinite().all() if right else model(**given).isnan().all())
        if right:
            model.check_bounds()
            continue
        with pytest.raises(
            ValueError, match=r"distinct ids of a batch reached \d+, outside \[0, 3\]; pass a larger id_bound"
        ):
            model.check_bounds()
        assert bool(model(**given).isfinite().all())


def test_rows_written_to_before_backward_are_noticed() -> None:
    model, table = build("cpu", torch.float32, True)
    out = model(**batch("cpu"))
    table.table.rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("what", ["tokens", "targets"])
@pytest.mark.parametrize("bounds", [{}, {"row_bound": B * L}], ids=["", "bounded"])
def test_a_wrong_id_is_refused_where_the_embedding_does_not_say_its_vocab_size(
    what: str, bounds: dict[str, int]
) -> None:
    model, table = build("cpu", torch.float32, True, **bounds)
    model.vocab_size = table.vocab_size = None  # type: ignore[assignment]
    if model.bounds is not None:
        model.bounds.vocab_size = None
    given = batch("cpu")
    given[what][0, 1] = V + 3
    with pytest.raises(ValueError, match=rf"is {V + 3}, but vocab_size is {V}"):
        model(**given)


class Nameless:
    """Reads in place, and does not say who owns what."""

    def __init__(self, table: ShardedTokenEmbedding) -> None:
        self.table, self.vocab_size = table, V
        self.in_place, self.record = table.in_place, table.record

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def refused_without_owners() -> list[str]:
    group, raised = SSPGroup(dist.group.WORLD), []
    sharded = Nameless(ShardedTokenEmbedding(V, E, group))
    alone = TokenizedAttention(B, L, 1, Nameless(ShardedTokenEmbedding(V, E)), group=SSPGroup(None))
    for fails in (lambda: TokenizedAttention(B, L, group.size, sharded, group=group), lambda: alone.regroup(group)):
        with pytest.raises(ValueError, match="with in_place and without owner_of, on 2 ranks") as caught:
            fails()
        raised.append(str(caught.value))
    return raised


def test_reading_in_place_on_several_ranks_needs_owners(rank_pools: Any) -> None:
    first, second = rank_pools(2).run(refused_without_owners)
    assert first == second and all("HashOwners(2).owner_of" in text for text in first)


def whole_table_on_every_rank(bounds: dict[str, int]) -> None:
    assert load_op("target_attention", device="cpu").implementation == "compiled"
    group = SSPGroup(dist.group.WORLD)
    given, found = batch("cpu", group.rank), []
    for ranks, owners in ((1, PermutedRows(V, 1)), (group.size, HashOwners(group.size))):
        torch.manual_seed(0)
        table = Counted(ShardedTokenEmbedding(V, E), True)
        table.owner_of = owners.owner_of
        among = group if ranks > 1 else SSPGroup(None)
        model = TokenizedAttention(B, L, ranks, table, group=among, num_heads=H, strategy="owner", **bounds)
        out = model(**given)
        out.square().sum().backward()
        dense = torch.zeros(V, E)
        for rows, grad in table.table.take_recorded():
            dense.index_add_(0, rows, grad)
        dist.all_reduce(dense)
        found.append((out.detach(), dense))
    for ours, exact in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [{}, {"row_bound": B * L}], ids=["", "bounded"])
def test_a_table_that_every_rank_holds_whole_is_owned_by_hash(rank_pools: Any, bounds: dict[str, int]) -> None:
    rank_pools(2).run(whole_table_on_every_rank, bounds)
