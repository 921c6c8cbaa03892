"""UniqueSpace against plain Python lists, fold and expand against sums over occurrences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin import UniqueSpace

ids = st.one_of(st.integers(0, 3), st.integers(0, 2**62), st.sampled_from([2**62, 2**62 - 1, 2**63 - 2]))
FOLDS = ("sum", "mean", "logsumexp")
batches = st.lists(st.lists(ids, max_size=8), max_size=5)  # samples of tokens, empty ones included


def pad(samples: list[list[int]], extra: int = 0) -> tuple[Tensor, Tensor]:
    """(B, L) tokens and lengths; the padding repeats real ids, so that reading it would show."""
    length = max((len(s) for s in samples), default=0) + extra
    grid = [s + ([s[0] if s else 3] * (length - len(s))) for s in samples]
    tokens = torch.tensor(grid, dtype=torch.int64).view(len(samples), length)
    return tokens, torch.tensor([len(s) for s in samples], dtype=torch.int64)


def packed(samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor([t for s in samples for t in s], dtype=torch.int64)
    return tokens, torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)


def spaces(samples: list[list[int]]) -> list[UniqueSpace]:
    tokens, cu_seqlens = packed(samples)
    return [
        UniqueSpace.from_padded(*pad(samples)),
        UniqueSpace.from_padded(*pad(samples, extra=2)),
        UniqueSpace.from_packed(tokens, cu_seqlens),
        UniqueSpace.from_packed(tokens, cu_seqlens.int()),
    ]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(batches)
def test_padded_and_packed_give_distinct_tokens_in_order_of_first_occurrence(samples: list[list[int]]) -> None:
    distinct = [list(dict.fromkeys(s)) for s in samples]
    tokens = [t for s in distinct for t in s]
    counts = [s.count(t) for s, d in zip(samples, distinct, strict=True) for t in d]
    bounds = [0]
    inverse = []
    for s, d in zip(samples, distinct, strict=True):
        inverse += [bounds[-1] + d.index(t) for t in s]
        bounds.append(bounds[-1] + len(d))
    for space in spaces(samples):
        assert space.tokens.tolist() == tokens
        assert space.counts.tolist() == counts
        assert space.inverse.tolist() == inverse
        assert space.cu_seqlens.tolist() == bounds
        assert space.cu_seqlens.dtype == torch.int32
        assert space.cu_occurrences.tolist() == packed(samples)[1].tolist()
        assert (space.num_samples, space.num_rows, space.num_occurrences) == (len(samples), len(tokens), len(inverse))
        assert space.all_distinct == (len(tokens) == len(inverse))
        assert space.positions().tolist() == [i for s in samples for i in range(len(s))]
        assert space.sample_of_rows().tolist() == [b for b, d in enumerate(distinct) for _ in d]
        assert space.sample_of_occurrences().tolist() == [b for b, s in enumerate(samples) for _ in s]


@given(batches)
def test_expand_returns_every_occurrences_token(samples: list[list[int]]) -> None:
    tokens, lengths = pad(samples, extra=1)
    by_grid, by_list = UniqueSpace.from_padded(tokens, lengths), UniqueSpace.from_packed(*packed(samples))
    rows = normal(by_grid.num_rows, 2)
    occurrences = by_list.expand(rows)
    assert torch.equal(occurrences, rows[by_grid.inverse])
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    grid = by_grid.expand(rows)
    assert torch.equal(grid[valid], occurrences)
    assert not grid[~valid].any()
    assert torch.equal(by_grid.as_packed().expand(rows), occurrences)
    assert torch.equal(by_grid.pack(grid), occurrences)


@given(batches)
def test_an_occurrence_space_keeps_every_occurrence(samples: list[list[int]]) -> None:
    tokens, cu_seqlens = packed(samples)
    for space in (
        UniqueSpace.of_occurrences(*pad(samples, extra=1)),
        UniqueSpace.of_occurrences(tokens, cu_seqlens=cu_seqlens),
    ):
        assert torch.equal(space.tokens, tokens)
        assert space.cu_seqlens.dtype == torch.int32
        assert space.cu_seqlens.tolist() == cu_seqlens.tolist()
        assert space.all_distinct
        assert space.log_counts() is None
        assert space.inverse.tolist() == list(range(tokens.numel()))


@pytest.mark.parametrize(
    "samples",
    [[], [[]], [[], [], []], [[7]], [[7, 7, 7]], [[1, 2, 3]], [[], [5], []], [[2**62, 0, 2**62]]],
    ids=["no samples", "length 0", "all length 0", "one token", "one id", "all distinct", "one of three", "2**62"],
)
def test_corner_batches_pass_forward_and_backward(samples: list[list[int]]) -> None:
    for space in spaces(samples):
        rows = normal(space.num_rows, 2).requires_grad_()
        bias = normal(space.num_occurrences).requires_grad_()
        term = normal(space.num_occurrences, 1, 2).requires_grad_()
        view = space.as_packed()
        total = space.expand(rows).sum() + view.fold_bias(bias).sum() + view.fold_value_term(term, bias).sum()
        total.backward()
        assert rows.grad is not None
        assert rows.grad[:, 0].tolist() == space.counts.tolist()


@given(batches)
def test_folds_equal_sums_over_each_tokens_occurrences(samples: list[list[int]]) -> None:
    by_grid, by_list = spaces(samples)[1:3]
    values = normal(by_list.num_occurrences, 2, 3)
    inverse, rows = by_list.inverse, range(by_list.num_rows)
    members = [(inverse == u).nonzero().squeeze(1) for u in rows]
    slots = by_grid.slots
    assert slots is not None
    grid = torch.full((len(samples), by_grid.padded_length or 0, 2, 3), torch.nan, dtype=torch.float64)
    grid.view(-1, 2, 3)[slots] = values  # what lies past a length is NaN: reading it would show
    folds = {
        "sum": lambda x: x.sum(0),
        "mean": lambda x: x.mean(0),
        "logsumexp": lambda x: x.logsumexp(0),
    }
    for how, plain in folds.items():
        expected = torch.stack([plain(values[m]) for m in members]) if members else values.new_zeros(0, 2, 3)
        for space, x in ((by_list, values), (by_grid, grid)):
            torch.testing.assert_close(space.fold(x, how), expected, rtol=0, atol=1e-12)


@given(batches, st.booleans(), st.floats(0, 1))
def test_folded_biases_and_value_terms_equal_softmax_over_occurrences(
    samples: list[list[int]], per_head: bool, absent: float
) -> None:
    space, heads = UniqueSpace.from_packed(*packed(samples)), 2
    members = space.num_occurrences
    bias = 3 * normal(members, heads) if per_head else 3 * normal(members)
    bias[torch.rand(bias.shape, generator=torch.Generator().manual_seed(7)) < absent] = -torch.inf
    term = normal(members, heads, 3, seed=1)
    weight, folded = space.fold_bias(bias), space.fold_value_term(term, bias)
    mean = space.fold_value_term(term)
    for u in range(space.num_rows):
        mine = space.inverse == u
        b = bias[mine] if per_head else bias[mine, None].expand(-1, heads)
        share = torch.softmax(b, 0).nan_to_num(0.0)  # all absent: nothing is added
        expected = torch.logsumexp(b, 0)
        torch.testing.assert_close(weight[u].expand(heads), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(folded[u], (share[..., None] * term[mine]).sum(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(mean[u], term[mine].mean(0), rtol=0, atol=1e-12)


@settings(max_examples=6)
@given(batches.filter(lambda b: any(b)))
def test_gradients_of_expand_and_fold(samples: list[list[int]]) -> None:
    space = UniqueSpace.from_padded(*pad(samples, extra=1))
    slots = (len(samples), space.padded_length)
    rows, values = normal(space.num_rows, 2).requires_grad_(), normal(*slots, 2).requires_grad_()
    for function, x in ((space.expand, rows), *((lambda v, h=how: space.fold(v, h), values) for how in FOLDS)):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
    bias, term = normal(*slots, 2).requires_grad_(), normal(*slots, 2, 1, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(space.fold_bias, bias)
    assert torch.autograd.gradcheck(lambda r, b: space.fold_value_term(r, b), (term, bias))
    assert torch.autograd.gradgradcheck(lambda r, b: space.fold_value_term(r, b), (term, bias))


@given(batches)
def test_a_space_made_without_gradients_is_the_same(samples: list[list[int]]) -> None:
    with torch.no_grad():
        spaces_without = spaces(samples)
    for space, without in zip(spaces(samples), spaces_without, strict=True):
        for name in ("tokens", "counts", "cu_seqlens", "inverse"):
            assert torch.equal(getattr(space, name), getattr(without, name)), name
        rows = normal(space.num_rows, 2).requires_grad_()
        values = normal(space.num_occurrences, 2, seed=1)
        grads = [torch.autograd.grad((x.as_packed().expand(rows) * values).sum(), rows)[0] for x in (space, without)]
        assert torch.equal(*grads)
        folds = [x.as_packed().fold(values, "logsumexp") for x in (space, without)]
        assert torch.equal(*folds) and torch.equal(space.segments.offsets, without.segments.offsets)


def test_absent_occurrences_pass_gradient_zero() -> None:
    space = UniqueSpace.from_packed(torch.tensor([4, 4, 4, 9, 9]))
    bias = torch.tensor([0.5, -torch.inf, 1.5, -torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
    term = normal(5, 1, 2).requires_grad_()
    weight, folded = space.fold_bias(bias), space.fold_value_term(term, bias)
    assert weight[1] == -torch.inf
    assert not folded[1].any()
    (weight[0] + folded.sum() + weight[1].clamp(min=-5)).backward()
    for grad in (bias.grad, term.grad):
        assert grad is not None
        assert torch.isfinite(grad).all()
        assert not grad[[1, 3, 4]].any()
        assert grad[[0, 2]].any()


def test_weights_of_low_precision_biases_are_float32() -> None:
    space = UniqueSpace.from_packed(torch.zeros(300, dtype=torch.int64))
    weight = space.fold_bias(torch.zeros(300, dtype=torch.bfloat16))
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.tensor([300.0]).log())
    counts = space.log_counts(torch.bfloat16)
    assert counts is not None
    assert counts.dtype == torch.float32
    torch.testing.assert_close(counts, weight)


def test_log_counts_are_none_only_where_every_count_is_one() -> None:
    assert UniqueSpace.from_packed(torch.tensor([3, 1, 2])).log_counts() is None
    weights = UniqueSpace.from_packed(torch.tensor([3, 1, 3])).log_counts(torch.float64)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([2.0, 1.0], dtype=torch.float64).log())


def test_backward_repeats_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (4, 300), generator=generator)
    lengths = torch.tensor([300, 120, 0, 299])
    values = torch.randn(4, 300, 5, generator=generator, requires_grad=True)
    bias = torch.randn(4, 300, 5, generator=generator, requires_grad=True)
    term = torch.randn(4, 300, 5, 3, generator=generator, requires_grad=True)
    runs = []
    for _ in range(3):
        space = UniqueSpace.from_padded(tokens, lengths)
        rows = torch.randn(space.num_rows, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss = (space.expand(rows) * values).square().sum() + (rows * space.fold(values)).sum()
        loss = loss + space.fold_bias(bias).square().sum() + space.fold_value_term(term, bias).square().sum()
        runs.append((loss.detach(), *torch.autograd.grad(loss, (rows, values, bias, term))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: UniqueSpace.from_padded(torch.zeros(2, 3).int(), torch.tensor([1, 1])), "tokens is torch.int32"),
        (lambda: UniqueSpace.from_padded(torch.zeros(3).long(), torch.tensor([1])), "tokens has shape"),
        (lambda: UniqueSpace.from_padded(torch.zeros(2, 3).long(), torch.tensor([1])), "lengths has 1 entries for 2"),
        (lambda: UniqueSpace.from_padded(torch.zeros(2, 3).long(), torch.tensor([1, 4])), "[0, L] with L = 3"),
        (lambda: UniqueSpace.from_padded(torch.zeros(2, 3).long(), torch.tensor([-1, 3])), "[0, L] with L = 3"),
        (lambda: UniqueSpace.from_packed(torch.zeros(3).long(), torch.tensor([0, 2])), "number of tokens, 3"),
        (lambda: UniqueSpace.from_packed(torch.zeros(3).long(), torch.tensor([0, 2, 1, 3])), "must rise"),
        (lambda: UniqueSpace.from_packed(torch.zeros(3).long()).fold(torch.zeros(3), "max"), "how is 'max'"),
        (lambda: UniqueSpace.from_packed(torch.zeros(3).long()).fold(torch.zeros(2)), "one per occurrence"),
        (lambda: UniqueSpace.from_padded(torch.zeros(2, 3).long(), torch.tensor([1, 3])).fold(torch.zeros(3)), "shape"),
    ],
)
def test_wrong_input_is_named(build: Any, match: str) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert match in str(error.value)


def test_a_space_is_shown_by_its_sizes() -> None:
    space = UniqueSpace.from_padded(torch.tensor([[7, 8, 7], [9, 9, 9]]), torch.tensor([3, 2]))
    assert repr(space) == "UniqueSpace(2 samples, 3 rows, 5 occurrences, L/U 1.67, cpu)"
    assert "3 rows and 1 spare, 5 occurrences, L/U 1.67" in repr(space.with_spare_rows(4))
    assert "0 rows, 0 occurrences, L/U undefined" in repr(UniqueSpace.from_packed(torch.zeros(0, dtype=torch.int64)))
    on_meta = UniqueSpace.of_rows(torch.zeros(3, dtype=torch.int64, device="meta"), torch.zeros(2, device="meta"))
    assert "1 samples, 3 rows" in repr(on_meta)  # no value is read
