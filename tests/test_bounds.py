"""Spaces and steps whose sizes the caller bounds: the same numbers as ever, and nothing visits the host.

Fake tensors hold no values, so whatever would read one raises: `FakeTensorMode` is the proof that nothing does.
"""

from __future__ import annotations

import math
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unique_space import FOLDS, batches, normal, packed, pad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention, UniqueSpace, bounded_space
from ta_plugin.bounded_space import BoundedSpace
from ta_plugin.bounds import Bounds
from ta_plugin.ops import load_op, segments
from ta_plugin.ops.segments import SEGMENT_LOGSUMEXP

B, L, T, V, D, H = 3, 9, 2, 20, 8, 4
NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def both(samples: list[list[int]], spare: int, as_packed: bool) -> tuple[UniqueSpace, BoundedSpace]:
    """The ordinary space of a batch and a bounded one with `spare` rows too many."""
    ordinary, bounded, *inputs = UniqueSpace.from_packed, BoundedSpace.of_packed, *packed(samples)
    if not as_packed:
        ordinary, bounded, *inputs = UniqueSpace.from_padded, BoundedSpace.of_padded, *pad(samples, extra=2)
    space = ordinary(*inputs)
    return space, bounded(*inputs, max(space.num_rows + spare, 1))


@given(batches, st.integers(0, 5), st.booleans())
def test_a_bounded_space_equals_the_ordinary_one(samples: list[list[int]], spare: int, as_packed: bool) -> None:
    space, larger = both(samples, spare, as_packed)
    rows, members = space.num_rows, space.num_occurrences
    larger.check()
    assert larger.num_rows == max(rows + spare, 1) and not larger.all_distinct
    for name in ("tokens", "counts"):
        assert torch.equal(getattr(larger, name)[:rows], getattr(space, name))
    assert not larger.counts[rows:].any() and bool((larger.tokens[rows:] == larger.tokens[:1]).all())
    assert larger.cu_seqlens.tolist() == space.cu_seqlens.tolist()
    assert larger.host_bounds[0] == space.host_bounds[0]
    for ours, exact in ((larger.inverse, space.inverse), (larger.segments.order, space.segments.order)):
        assert torch.equal(ours[:members], exact)
    assert torch.equal(larger.segments.offsets[: rows + 1], space.segments.offsets)
    assert bool((larger.segments.offsets[rows:] == members).all())
    for name in ("positions", "sample_of_occurrences"):
        assert torch.equal(getattr(larger, name)()[:members], getattr(space, name)())
    assert torch.equal(larger.sample_of_rows()[:rows], space.sample_of_rows())


@settings(max_examples=40)
@given(batches, st.integers(0, 5), st.sampled_from(FOLDS), st.integers(0, 99))
def test_folds_and_expansion_of_a_bounded_space(samples: list[list[int]], spare: int, how: str, seed: int) -> None:
    space, larger = both(samples, spare, as_packed=False)
    length = space.padded_length or 0
    values = normal(len(samples), length, 2, seed=seed)
    values = values.masked_fill((torch.arange(length) >= space.cu_occurrences.diff()[:, None])[..., None], torch.nan)
    weight = normal(larger.num_rows, 2, seed=seed + 1)
    results = []
    for each in (space, larger):
        x = values.clone().requires_grad_()
        folded = each.fold(x, how)
        rows = (folded * weight[: each.num_rows])[: space.num_rows]
        grid = each.expand(torch.cat([rows, weight[space.num_rows : each.num_rows]]))
        (grid * normal(*grid.shape)).sum().backward()
        results.append((rows, grid, x.grad))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 9))
def test_tokens_past_the_last_bound_are_left_out(tokens: list[int], end: int) -> None:
    end = min(end, len(tokens))
    exact = UniqueSpace.from_packed(torch.tensor(tokens)[:end])
    ours = BoundedSpace.of_packed(torch.tensor(tokens), torch.tensor([0, end]), 7)
    ours.check()
    assert ours.found is not None and ours.found.tolist()[:2] == [end, exact.num_rows]
    assert torch.equal(ours.tokens[: exact.num_rows], exact.tokens)
    assert ours.fold(torch.ones(len(tokens))).tolist()[: exact.num_rows] == exact.counts.tolist()
    assert int(ours.counts.sum()) == end


def test_members_of_no_segment_do_not_lift_a_peak() -> None:
    """A spare member points at row 0 with value 0, beside which exp(-1000) would vanish."""
    space = BoundedSpace.of_padded(torch.tensor([[7, 7, 7]]), torch.tensor([2]), 2)
    values = torch.tensor([-1000.0, -1000.0, 0.0], dtype=torch.float64)
    found = SEGMENT_LOGSUMEXP.in_torch(values, *space.segments.tensors())
    torch.testing.assert_close(found, torch.tensor([math.log(2) - 1000, -torch.inf], dtype=torch.float64))


def test_spare_rows_are_empty_and_what_does_not_fit_is_an_empty_batch_that_says_so() -> None:
    tokens, lengths = torch.tensor([[4, 2, 4], [5, 7, 1]]), torch.tensor([3, 2])
    fits = BoundedSpace.of_padded(tokens, lengths, 6)
    assert fits.log_counts().tolist()[4:] == [-torch.inf] * 2  # type: ignore[union-attr]
    assert fits.fold(torch.ones(2, 3)).tolist() == [2, 1, 1, 1, 0, 0]
    small = BoundedSpace.of_padded(tokens, lengths, 3)
    assert small.cu_seqlens.tolist() == [0, 0, 0] and not small.counts.any()
    assert not small.fold(torch.ones(2, 3)).any() and not small.inverse.any()
    with pytest.raises(ValueError, match="tokens hold 4 distinct rows, but rows is 3"):
        small.check()
    wrong = BoundedSpace.of_padded(tokens, torch.tensor([3, 4]), 6)
    assert not wrong.counts.any()
    with pytest.raises(ValueError, match=r"lengths lie in \[3, 4\]"):
        wrong.check()
    with pytest.raises(ValueError, match="cu_seqlens does not rise"):
        BoundedSpace.of_packed(tokens.view(-1), torch.tensor([0, 7, 6]), 6).check()
    with pytest.raises(ValueError, match="cu_seqlens does not rise"):
        BoundedSpace.of_packed(tokens.view(-1), torch.tensor([0, 7]), 6).check()
    with pytest.raises(ValueError, match="rows is 0; pass"):
        BoundedSpace.of_padded(tokens, lengths, 0)


@pytest.fixture(scope="module")
def compiled() -> None:
    pytest.importorskip("deepspeed")
    op = load_op("target_attention")
    assert op.implementation == "compiled", op.reason


def build(row_bound: int | None, table: Any = None, **options: Any) -> TokenizedAttention:
    torch.manual_seed(0)
    table = table or ShardedTokenEmbedding(V, D, dtype=torch.float64)
    kv = options.get("num_kv_heads", H)
    maps: dict[str, Any] = {"query": nn.Linear(D, 4 * H), "key": nn.Linear(D, 4 * kv), "value": nn.Linear(D, 4 * kv)}
    maps["output"] = nn.Linear(4 * H, D)
    options = {"strategy": "owner", **maps, **options}
    return TokenizedAttention(B, L, 1, table, num_heads=H, row_bound=row_bound, **options).double()


def inputs(seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens, lengths = torch.randint(0, V, (B, L), generator=g), torch.randint(0, L + 1, (B,), generator=g)
    return {"tokens": tokens, "lengths": lengths, "targets": torch.randint(0, V, (B, T), generator=g), **more}


def results_of(model: TokenizedAttention, given: dict[str, Tensor]) -> list[Tensor]:
    """Output and every gradient, those of the table as a whole one."""
    leaves = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()}
    out = model(**leaves)
    out.sin().sum().backward()
    dense = torch.zeros(V, D, dtype=torch.float64)
    for rows, grad in model.embedding_fn.take_recorded():  # type: ignore[union-attr,operator]
        dense.index_add_(0, rows, grad)
    parameters = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), dense, *parameters, *(x.grad for x in leaves.values() if x.grad is not None)]


CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "owner": ({}, {}),
    "gather, grouped heads": ({"strategy": "gather", "num_kv_heads": 2}, {}),
    "auto, bias": ({"strategy": "auto"}, {"bias": normal(B, L, H)}),
    "silu, multiplier": ({"normaliser": "none", "activation": F.silu}, {"multiplier": normal(B, L).abs()}),
    "the embedding itself": ({"query": None, "key": None, "value": None, "output": None}, {}),
    "another backend": ({"backend": "reference"}, {}),
    "queries": ({}, {"queries": normal(B, T, D)}),
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", CASES)
def test_a_bounded_step_equals_the_ordinary_one(case: str) -> None:
    options, sides = CASES[case]
    for seed, bound, ids in ((0, B * L, None), (1, 3 * 10, 14), (2, 24, V)):
        given = inputs(seed, **sides)
        if "queries" in sides:
            del given["targets"]
        ordinary, bounded = build(None, **options), build(bound, id_bound=ids, **options)
        expected, found = results_of(ordinary, given), results_of(bounded, given)
        bounded.check_bounds()
        assert len(found) == len(expected) >= 2
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("case", ["owner", "auto, bias", "queries"])
def test_members_are_grouped_with_the_rows_where_they_are_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, sides = CASES[case]
    flags: list[bool] = []
    unique = bounded_space.UNIQUE

    def noted(tokens: Tensor, extents: Tensor, rows: int, grouped: bool) -> Any:
        flags.append(grouped)
        return unique(tokens, extents, rows, grouped)

    monkeypatch.setattr(bounded_space, "UNIQUE", noted)
    monkeypatch.setattr(segments, "GROUP", None)  # nothing is grouped afterwards
    given, model = inputs(0, **sides), build(B * L, **options)
    if "queries" in sides:
        del given["targets"]
    results_of(model, given)
    assert flags[0] == ("bias" in sides) and len(flags) >= 2 and all(flags[1:])
    flags.clear()
    with torch.no_grad():
        model(**given)
    assert flags[0] == ("bias" in sides) and len(flags) >= 2 and not any(flags[1:])


@pytest.mark.usefixtures("compiled")
def test_empty_batches_and_nan_rows() -> None:
    given = inputs()
    given["lengths"] = torch.zeros(B, dtype=torch.int64)
    model = build(6, output=None)
    assert not results_of(model, given)[0].any()
    given = inputs(1)
    given["lengths"] = torch.tensor([0, L, L])
    given["tokens"].fill_(3)
    given["tokens"][1] = 7
    given["targets"].fill_(5)
    model = build(11, output=None)
    model.embedding_fn.rows[model.embedding_fn.owners.permute(torch.tensor(7))] = torch.nan  # type: ignore
    out = model(**given)
    assert out.isnan().any(2).any(1).tolist() == [False, True, False]


@pytest.mark.usefixtures("compiled")
def test_a_model_trains_after_it_was_tried_in_inference_mode() -> None:
    model, wrong = build(B * L), inputs()
    wrong["tokens"] = wrong["tokens"] + V
    with torch.inference_mode():
        tried = model(**inputs())
        assert bool(model(**wrong).isnan().all())
    with pytest.raises(ValueError, match="ids reached"):
        model.check_bounds()
    out = model(**inputs())
    out.sum().backward()
    assert torch.equal(out, tried)
    model.check_bounds()


@pytest.mark.usefixtures("compiled")
def test_nothing_visits_the_host() -> None:
    for bound in (B * L, None):
        table = nn.Embedding(V, D).double()  # fake ones must not be recorded
        model = build(bound, table)
        given = inputs(bias=normal(B, L))
        if bound:
            model(**given)  # makes the limits' tensors, from the host
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = {name: mode.from_tensor(x) for name, x in given.items()}
            if bound is None:
                with pytest.raises((ValueError, *NO_VALUES), match=r"nonzero|local_scalar"):
                    model(**fake)
                return
            model(**fake).sum().backward()
            assert model.bounds is not None
            with pytest.raises(NO_VALUES):
                UniqueSpace.from_padded(fake["tokens"], fake["lengths"])


@pytest.mark.parametrize(
    ("change", "bounds", "message"),
    [
        ({}, (8, None), r"distinct rows of a batch reached \d+, outside \[0, 8\]; pass a larger row_bound"),
        ({}, (27, 6), r"distinct ids of a batch reached \d+, outside \[0, 6\]; pass a larger id_bound"),
        ({"lengths": torch.tensor([1, L + 1, 2])}, (27, None), rf"lengths reached {L + 1}, outside \[0, {L}\]"),
        ({"lengths": torch.tensor([1, -1, 2])}, (27, None), r"lengths reached -1, outside"),
        ({"tokens": torch.full((B, L), -4)}, (27, None), rf"ids reached -4, outside \[0, {V - 1}\]"),
        ({"tokens": torch.full((B, L), V)}, (27, None), rf"ids reached {V}, outside \[0, {V - 1}\]"),
        ({"targets": torch.full((B, T), V + 1)}, (27, None), rf"ids reached {V + 1}, outside"),
    ],
)
def test_what_does_not_fit_gives_nan_and_raises_when_asked(
    change: dict[str, Tensor], bounds: tuple[int, int | None], message: str
) -> None:
    model = build(bounds[0], nn.Embedding(V, D), id_bound=bounds[1])
    given = inputs()
    given["lengths"].fill_(L)
    model.check_bounds()
    out = model(**{**given, **change})
    assert bool(out.isnan().all())
    given["lengths"].fill_(1)  # a batch that fits does not hide the one before
    assert bool(model(**given).isfinite().all())
    with pytest.raises(ValueError, match=message):
        model.check_bounds()
    model.check_bounds()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"row_bound": 0}, {}, "row_bound is 0; pass 1 or more"),
        ({"row_bound": 9, "id_bound": 2**31}, {}, "id_bound is 2147483648; pass"),
        ({"row_bound": None, "id_bound": 5}, {}, "id_bound is 5 without row_bound"),
        ({"row_bound": None, "route_bound": 5}, {}, "route_bound is 5 without row_bound"),
        ({"row_bound": 9, "route_bound": 0}, {}, "route_bound is 0; pass 1 or more"),
        ({"row_bound": 9, "include_self": True}, {}, "row_bound is 9, with .* include_self=True; it covers"),
        ({"row_bound": 9, "strategy": "positions"}, {}, "strategy 'positions'.* it covers layout 'sample'"),
        ({"row_bound": 9}, {"targets": None}, "row_bound is given in self-attention"),
        ({"row_bound": 9}, {"target_cutoffs": torch.ones(B, T).long()}, "target_cutoffs is given with row_bound"),
        ({"row_bound": 9}, {"target_lengths": torch.ones(B).long()}, "target_lengths is given with row_bound"),
    ],
)
def test_what_bounds_do_not_cover_is_named(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)(**{**inputs(), **change})


def test_bounds_by_themselves() -> None:
    bounds = Bounds(10, 3)
    bounds.space(torch.tensor([[1, 2]]), torch.tensor([2]), None)
    distinct = bounds.distinct(torch.tensor([2**62, 5]))
    assert bounds.owned(distinct).tokens[:2].tolist() == [2**62, 5]  # no vocabulary: every id is one
    assert not bounds.wrong()
    bounds.check()


def test_a_bounded_space_is_shown_by_its_bounds() -> None:
    space = BoundedSpace.of_padded(torch.tensor([[7, 8, 7], [9, 9, 9]]), torch.tensor([3, 2]), 30)
    assert repr(space) == "BoundedSpace(2 samples, room for 30 rows, 6 occurrences, cpu)"
