"""Bounded sizes on several ranks: the same numbers as without bounds and over positions, and what does not fit is told to everybody."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ON_GPUS
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, SSPGroup, TokenizedAttention
from ta_plugin.bounds import default_route

B, L, T, V, D, H = 3, 12, 2, 40, 16, 4
DTYPE = torch.float32 if ON_GPUS else torch.float64
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-12}[DTYPE]

# options of the class, and what a batch holds beside tokens, lengths and targets
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "auto, grouped heads": {"strategy": "auto", "num_kv_heads": 2},
    "bias": {"sides": ("bias",)},
    "silu, multiplier": {"normaliser": "none", "activation": F.silu, "sides": ("multiplier",)},
    "counts without a normaliser": {"normaliser": "none", "activation": F.silu},
    "the embedding itself": {"maps": False},
    "queries": {"sides": ("queries",)},
    "a table of one's own, ids by hash": {"hashed": True},
}
# which rank reads what
BATCHES = (
    "mixed",
    "one rank reads nothing",
    "nobody reads anything",
    "one token everywhere",
    "all distinct",
    "one owner",
)


class Strict(nn.Module):
    """A sharded table that is asked for what this rank owns only."""

    def __init__(self, table: ShardedTokenEmbedding) -> None:
        super().__init__()
        self.table, self.vocab_size, self.owner_of = table, table.vocab_size, table.owner_of

    def forward(self, ids: Tensor) -> Tensor:
        assert bool((self.owner_of(ids) == self.table.group.rank).all()), ids
        return self.table(ids)


def asks_for_its_own_ids_only() -> None:
    group = SSPGroup(dist.group.WORLD)
    table = ShardedTokenEmbedding(V, D, group, dtype=DTYPE)
    model = TokenizedAttention(B, L, group.size, Strict(table), group=group, row_bound=B * L, strategy="owner")
    for batch in BATCHES:
        given = draw(batch, group.rank, group)
        model(**given).sum().backward()
        given["tokens"][0, 0] = given["targets"][0, 0] = V - 1 + group.rank  # wrong on the others
        given["lengths"][0] = 1
        model(**given)


def test_no_rank_looks_up_what_it_does_not_own(rank_pools: Any) -> None:
    rank_pools(2).run(asks_for_its_own_ids_only)


def build(group: SSPGroup, options: dict[str, Any], **bounds: int) -> TokenizedAttention:
    options = dict(options)
    options.pop("sides", None)
    torch.manual_seed(0)
    hashed = options.pop("hashed", False)
    table: Any = nn.Embedding(V, D, dtype=DTYPE) if hashed else ShardedTokenEmbedding(V, D, group, dtype=DTYPE)
    maps: dict[str, Any] = {}
    if options.pop("maps", True):
        kv = options.get("num_kv_heads", H) * 4
        maps = {name: nn.Linear(D, n, dtype=DTYPE) for name, n in (("query", 4 * H), ("key", kv), ("value", kv))}
        maps["output"] = nn.Linear(4 * H, D, dtype=DTYPE)
    options = {"strategy": "owner", "group": group, "num_heads": H, **maps, **options}
    return TokenizedAttention(B, L, group.size, table, **options, **bounds)


def owned_by(group: SSPGroup, rank: int) -> Tensor:
    """The ids of a sharded table that `rank` owns."""
    table = ShardedTokenEmbedding(V, 1, group)
    ids = torch.arange(V)
    return ids[table.owner_of(ids) == rank]


def draw(batch: str, rank: int, group: SSPGroup, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed * 100 + rank)
    tokens, lengths = torch.randint(0, V, (B, L), generator=g), torch.randint(0, L + 1, (B,), generator=g)
    if batch == "nobody reads anything" or (batch == "one rank reads nothing" and rank == 0):
        lengths = torch.zeros_like(lengths)
    if batch == "one token everywhere":
        tokens = torch.full_like(tokens, 7)
    if batch == "all distinct":
        tokens = torch.stack([torch.randperm(V, generator=g)[:L] for _ in range(B)])
    targets = torch.randint(0, V, (B, T), generator=g)
    if batch == "one owner":
        ids = owned_by(group, 1)
        tokens, targets = ids[tokens % ids.numel()], ids[targets % ids.numel()]
    return {"tokens": tokens, "lengths": lengths, "targets": targets}


def with_sides(given: dict[str, Tensor], sides: tuple[str, ...], rank: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7 + rank)
    for name in sides:
        shape = (B, T, D) if name == "queries" else (B, L, H)
        given[name] = torch.randn(*shape, generator=g, dtype=DTYPE).requires_grad_()
    if "queries" in sides:
        del given["targets"]
    return given


def over_positions(model: TokenizedAttention, given: dict[str, Tensor], table: Tensor) -> Tensor:
    """Softmax attention of each target over every position, in the rows' dtype, without a word of unique space."""
    p, rows = model.projections, []
    for b in range(B):
        history = table[given["tokens"][b, : int(given["lengths"][b])]]
        asked = given["queries"][b] if "queries" in given else table[given["targets"][b]]
        q = p.queries(asked)
        k, v = p.keys_values(history)
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thd,lhd->htl", q, k) * q.shape[2] ** -0.5
        if "bias" in given:
            scores = scores + given["bias"][b, : k.shape[0]].T[:, None]
        if model.scoring.normaliser == "softmax":
            shares = scores.softmax(-1)
        else:
            times = given["multiplier"][b, : k.shape[0]].T[:, None] if "multiplier" in given else 1.0
            shares = F.silu(scores) * times
        rows.append(torch.einsum("htl,lhd->thd", shares, v).flatten(1))
    out = torch.stack(rows)
    return out if model.output is None else model.output(out)


def results(model: TokenizedAttention, given: dict[str, Tensor]) -> list[Tensor]:
    """Output and gradients: of leaves, of dense parameters on this rank, of the table's rows on this rank."""
    leaves = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in given.items()}
    model.zero_grad()
    out = model(**leaves)
    out.sin().sum().backward()
    table: Any = model.embedding_fn
    if isinstance(table, nn.Embedding):
        rows = table.weight.grad
    else:
        rows = torch.zeros_like(table.rows)
        for index, grad in table.take_recorded():
            rows.index_add_(0, index, grad)
    dense = [p.grad for m in (model.projections, model.output) if m is not None for p in m.parameters()]
    return [
        x.clone() for x in (out.detach(), rows, *dense, *(x.grad for x in leaves.values() if x.is_floating_point()))
    ]


def equals_unbounded_and_positions(case: str) -> None:
    options = CASES[case]
    group = SSPGroup(dist.group.WORLD)
    ordinary = build(group, {**options, "strategy": "owner"})
    bounded = build(group, options, row_bound=B * L + 3, id_bound=V + 1, route_bound=B * L)
    for seed, batch in enumerate(BATCHES):
        every = [with_sides(draw(batch, r, group, seed), options.get("sides", ()), r) for r in range(group.size)]
        found, expected = results(bounded, every[group.rank]), results(ordinary, every[group.rank])
        assert len(found) == len(expected)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=CLOSE)
        bounded.check_bounds()

        # the oracle: positions of every rank, all gradients on this one
        table: Any = ordinary.embedding_fn
        whole = (table.weight if isinstance(table, nn.Embedding) else table.to_dense()).detach().requires_grad_()
        ordinary.zero_grad()
        outs = [over_positions(ordinary, each, whole) for each in every]
        torch.testing.assert_close(found[0], outs[group.rank].detach(), rtol=0, atol=CLOSE)
        sum(out.sin().sum() for out in outs).backward()  # type: ignore[union-attr]
        parameters = [p for m in (ordinary.projections, ordinary.output) if m is not None for p in m.parameters()]
        for total, parameter in zip(found[2:], parameters, strict=False):
            dist.all_reduce(total)
            torch.testing.assert_close(total, parameter.grad, rtol=0, atol=CLOSE * 10)
        rows, grad = found[1].clone(), whole.grad
        assert grad is not None
        if isinstance(table, nn.Embedding):
            dist.all_reduce(rows)  # every rank has the whole table, and the gradients of the ids it owns
            torch.testing.assert_close(rows, grad, rtol=0, atol=CLOSE * 10)
        else:
            first = group.rank * table.owners.rows_per_rank
            mine = table.owners.ids_of_rows(torch.arange(first, first + rows.shape[0]))
            torch.testing.assert_close(rows, grad[mine], rtol=0, atol=CLOSE * 10)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_bounded_steps_equal_unbounded_ones_and_attention_over_positions(
    rank_pools: Any, case: str, ranks: int
) -> None:
    rank_pools(ranks).run(equals_unbounded_and_positions, case)


OVERFLOWS: dict[str, tuple[dict[str, int], str]] = {
    "rows": ({"row_bound": 20}, r"distinct rows of a batch reached \d+, outside \[0, 20\]; pass a larger row_bound"),
    "ids": ({"id_bound": 5}, r"distinct ids of a batch reached \d+, outside \[0, 5\]; pass a larger id_bound"),
    "route": (
        {"route_bound": 8},
        r"rows of a batch for one owner reached \d+, outside \[0, 8\]; pass a larger route_bound",
    ),
    "a length": ({}, rf"lengths reached {L + 1}, outside \[0, {L}\]"),
    "a token": ({}, rf"ids reached {V + 3}, outside \[0, {V - 1}\]"),
    "a negative token": ({}, r"ids reached -2, outside"),
    "a target": ({}, rf"ids reached {V}, outside \[0, {V - 1}\]"),
}


def one_rank_overflows(what: str) -> list[str]:
    """What every rank raises when only rank 1's batch is wrong; the batches before and after it are right on all."""
    group = SSPGroup(dist.group.WORLD)
    bounds = {"row_bound": B * L, **OVERFLOWS[what][0]}
    model, ordinary = build(group, {}, **bounds), build(group, {})
    fitting = draw("mixed", group.rank, group)
    fitting["lengths"] = torch.ones(B, dtype=torch.int64)
    fitting["targets"] = fitting["targets"][:, :1].expand(B, T).contiguous() % 2
    bad = {name: x.clone() for name, x in draw("all distinct", group.rank, group).items()}
    bad["lengths"].fill_(1)
    if what == "ids":  # distinct ids are those of all ranks, so only all of them together
        bad["targets"], bad["lengths"] = fitting["targets"], torch.full((B,), L)
    elif group.rank == 1:
        bad["lengths"].fill_(L)
        if what == "a length":
            bad["lengths"][2] = L + 1
        elif what == "a target":
            bad["targets"][0, 1] = V
        elif "token" in what:
            bad["tokens"][1, 3] = V + 3 if what == "a token" else -2
    raised = []
    for _ in range(2):
        expected, found = results(ordinary, fitting), results(model, fitting)
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=CLOSE)
        model.check_bounds()
        out, rows, *_ = results(model, bad)
        assert bool(out.isnan().all()), out
        assert bool(rows.isfinite().all()) and not rows.any()
        found = results(model, fitting)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=CLOSE)
        try:
            model.check_bounds()
        except ValueError as error:
            raised.append(str(error))
        model.check_bounds()
    return raised


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("what", OVERFLOWS)
def test_what_does_not_fit_on_one_rank_gives_nan_on_every_rank_and_raises_the_same(
    rank_pools: Any, what: str, ranks: int
) -> None:
    raised = rank_pools(ranks).run(one_rank_overflows, what)
    assert all(each == raised[0] for each in raised) and len(raised[0]) == 2
    for text in raised[0]:
        assert re.search(OVERFLOWS[what][1], text), text


class Wrapper(nn.Module):
    """A table behind methods of one's own choice, without its `vocab_size`."""

    def __init__(self, table: ShardedTokenEmbedding, *methods: str) -> None:
        super().__init__()
        self.table = table
        for method in methods:
            setattr(self, method, getattr(table, method))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def one_rank_names_what_nobody_owns(what: str, methods: tuple[str, ...]) -> str:
    group = SSPGroup(dist.group.WORLD)
    table = Wrapper(ShardedTokenEmbedding(V, D, group, dtype=DTYPE), *methods)
    model = TokenizedAttention(B, L, group.size, table, group=group, row_bound=B * L)
    given = draw("mixed", group.rank, group)
    given["lengths"].fill_(L)
    right = model(**given)
    assert bool(right.isfinite().all())
    model.check_bounds()
    if group.rank == 1:
        given[what][1, 1] = V + 3
    out = model(**given)
    assert bool(out.isnan().all()), out
    with pytest.raises(ValueError) as caught:
        model.check_bounds()
    return str(caught.value)


@pytest.mark.parametrize("methods", [("owner_of",), ("owner_of", "in_place", "record")], ids=["copied", "in place"])
@pytest.mark.parametrize("what", ["tokens", "targets"])
def test_a_wrapper_without_vocab_size_loses_nothing(rank_pools: Any, what: str, methods: tuple[str, ...]) -> None:
    raised = rank_pools(2).run(one_rank_names_what_nobody_owns, what, methods)
    assert raised[0] == raised[1]
    assert "owner_of reached -1, outside [0, 1]; embedding_fn has no owner for such ids" in raised[0]


def refused() -> list[str]:
    group, raised = SSPGroup(dist.group.WORLD), []
    rank = group.rank

    def narrow() -> None:  # T differs
        given = draw("mixed", rank, group)
        given["targets"] = given["targets"][:, : T - rank]
        build(group, {}, row_bound=B * L)(**given)

    def with_term() -> None:
        build(group, {}, row_bound=B * L)(**draw("mixed", rank, group), value_term=torch.ones(B, L, H, 4, dtype=DTYPE))

    def few_ids() -> None:
        table = ShardedTokenEmbedding(group.size - 1, D, group, dtype=DTYPE)
        model = TokenizedAttention(B, L, group.size, table, group=group, row_bound=9)
        zeros = torch.zeros(B, L, dtype=torch.int64)
        model(zeros, zeros[:, 0], targets=zeros[:, :1])

    tries: list[Callable[[], Any]] = [
        lambda: build(group, {"strategy": "gather"}, row_bound=9),
        lambda: build(group, {"strategy": "positions"}, row_bound=9),
        lambda: build(group, {"layout": "sequence"}, row_bound=9),
        lambda: build(group, {"include_self": True}, row_bound=9),
        lambda: build(group, {}, row_bound=9 + rank),
        lambda: build(group, {}, row_bound=9, route_bound=9 - rank),
        lambda: build(group, {}, row_bound=2**31 - 1, route_bound=2**31 - 1),
        narrow,
        with_term,
        few_ids,
    ]
    for attempt in tries:
        try:
            attempt()
        except ValueError as error:
            raised.append(str(error))
    return raised


def test_what_bounds_do_not_cover_is_named_on_every_rank(rank_pools: Any) -> None:
    first, *others = rank_pools(2).run(refused)
    assert all(other == first for other in others)
    for text, wanted in zip(
        first,
        (
            "with 2 rank(s), layout 'sample', strategy 'gather'",
            "strategy 'positions'",
            "layout 'sequence'",
            "include_self=True",
            "row_bound is 9 on rank 0 but 10 on rank 1",
            "route_bound is 9 on rank 0 but 8 on rank 1",
            "route_bound is 2147483647 on 2 ranks",
            "samples have 2 targets on rank 0 but 1 on rank 1; with row_bound pass the same",
            "value_term is given with row_bound",
            "rank 1 owns none of the first 1 ids, but row_bound needs one",
        ),
        strict=True,
    ):
        assert wanted in text


def nothing_at_all() -> None:
    """No samples, and samples without targets."""
    group = SSPGroup(dist.group.WORLD)
    table = ShardedTokenEmbedding(V, D, group, dtype=DTYPE)
    for batch, width in ((0, T), (B, 0)):
        model = TokenizedAttention(batch, L, group.size, table, group=group, row_bound=B * L)
        tokens = torch.ones(batch, L, dtype=torch.int64)
        out = model(tokens, torch.full((batch,), L), targets=torch.ones(batch, width, dtype=torch.int64))
        assert out.shape == (batch, width, D)
        out.sum().backward()
        model.check_bounds()


def test_no_samples_and_no_targets(rank_pools: Any) -> None:
    rank_pools(2).run(nothing_at_all)


def moved_to_a_group() -> float:
    """A bounded model built for one rank works on its group's ranks."""
    group = SSPGroup(dist.group.WORLD)
    torch.manual_seed(0)
    table = nn.Embedding(V, D, dtype=DTYPE)
    model = TokenizedAttention(B, L, 1, table, group=SSPGroup(None, device=group.device), row_bound=1000)
    given = draw("mixed", group.rank, group)
    alone = model(**given)
    model.regroup(group)
    assert model.bounds is not None and model.bounds.route == default_route(1000, group.size) < 1000
    together = model(**given)
    model.check_bounds()
    return float((together - alone).abs().max())


def test_a_bounded_model_moves_to_a_group(rank_pools: Any) -> None:
    assert all(difference < CLOSE for difference in rank_pools(2).run(moved_to_a_group))


def test_the_default_of_route_bound() -> None:
    assert default_route(20, 2) == 20 and default_route(8000, 4) == 2564 and default_route(1, 64) == 1
