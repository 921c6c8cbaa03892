"""Segment sums, their transpose and segment log-sum-exp against loops, with gradients of both orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.attention import target_attention
from ta_plugin.ops import Segments, expand, segment_logsumexp, segment_sum
from ta_plugin.ops import segments as module
from ta_plugin.ops.connect import connect

indices = st.lists(st.integers(0, 4), max_size=12)
TRAILING = [(), (3,), (2, 3)]


def values_of(index: list[int], trailing: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(index), *trailing, generator=generator, dtype=torch.float64)


def segments_of(index: list[int], num_segments: int = 6) -> Segments:
    return Segments.from_index(torch.tensor(index, dtype=torch.int64), num_segments)


@given(indices)
def test_segments_list_their_members_in_ascending_order(index: list[int]) -> None:
    segments = segments_of(index)
    assert (segments.num_members, segments.num_segments) == (len(index), 6)
    for s in range(6):
        members = segments.order[segments.offsets[s] : segments.offsets[s + 1]].tolist()
        assert members == [j for j, x in enumerate(index) if x == s]


@pytest.fixture
def groupings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many members each grouping had."""
    found: list[int] = []
    group = module.GROUP

    def counted(index: Tensor, counts: Tensor) -> Any:
        found.append(index.numel())
        return group(index, counts)

    monkeypatch.setattr(module, "GROUP", counted)
    return found


def test_members_are_grouped_once_and_only_where_somebody_reads_them(groupings: list[int]) -> None:
    index = [3, 0, 3, 3, 1]
    segments, rows = segments_of(index), values_of([0] * 6, (2,)).requires_grad_()
    q, bounds = torch.randn(1, 1, 2, dtype=torch.float64), torch.tensor([0, 5], dtype=torch.int32)
    with torch.no_grad():
        spread = expand(rows, segments)
        target_attention(q, rows.unsqueeze(1), None, segments, torch.tensor([0, 1], dtype=torch.int32), bounds)
    assert torch.equal(spread, rows[index]) and groupings == []
    expand(rows, segments).sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == [1, 1, 0, 3, 0, 0]
    assert torch.equal(segment_sum(spread, segments), rows.detach() * rows.grad) and groupings == [5]
    more = segments_of(index).with_empty(2)
    assert more.offsets.tolist() == [0, 1, 2, 2, 5, 5, 5, 5, 5] and more.order.tolist() == segments.order.tolist()
    assert Segments(segments.index, *segments.grouped).with_empty(2).offsets.tolist() == more.offsets.tolist()


def test_segments_take_one_of_two_forms() -> None:
    index = torch.zeros(3, dtype=torch.int64)
    for wrong in ({}, {"order": index}, {"order": index, "offsets": index, "counts": index}):
        with pytest.raises(ValueError, match="pass one of the two"):
            Segments(index, **wrong)


@given(indices, st.sampled_from(TRAILING))
def test_segment_sum_equals_a_loop_and_empty_segments_give_zero(index: list[int], trailing: tuple[int, ...]) -> None:
    values = values_of(index, trailing)
    expected = torch.zeros(6, *trailing, dtype=torch.float64)
    for j, s in enumerate(index):
        expected[s] += values[j]
    torch.testing.assert_close(segment_sum(values, segments_of(index)), expected, rtol=0, atol=1e-12)


@given(indices, st.sampled_from(TRAILING))
def test_expand_gives_each_member_its_segments_row(index: list[int], trailing: tuple[int, ...]) -> None:
    rows = values_of(list(range(6)), trailing)
    assert torch.equal(expand(rows, segments_of(index)), rows[torch.tensor(index, dtype=torch.int64)])


@given(indices, st.sampled_from(TRAILING), st.booleans())
def test_segment_logsumexp_equals_torch(index: list[int], trailing: tuple[int, ...], large: bool) -> None:
    values = values_of(index, trailing) * (1e4 if large else 1.0)
    values[1::3] = -torch.inf
    members = torch.tensor(index, dtype=torch.int64)
    expected = torch.stack([torch.logsumexp(values[members == s], 0) for s in range(6)])
    torch.testing.assert_close(segment_logsumexp(values, segments_of(index)), expected, rtol=1e-14, atol=1e-12)


@settings(max_examples=15)
@given(indices.filter(len), st.sampled_from(TRAILING))
def test_gradients_of_both_orders(index: list[int], trailing: tuple[int, ...]) -> None:
    segments, values = segments_of(index), values_of(index, trailing).requires_grad_()
    rows = values_of(list(range(6)), trailing, seed=1).requires_grad_()
    present = torch.tensor(sorted(set(index)))  # an empty segment's -inf has no finite difference

    def logsumexp(x: Tensor) -> Tensor:
        return segment_logsumexp(x, segments)[present]

    for function, at in ((lambda x: segment_sum(x, segments), values), (lambda x: expand(x, segments), rows)):
        assert torch.autograd.gradcheck(function, at)
        assert torch.autograd.gradgradcheck(function, at)
    assert torch.autograd.gradcheck(logsumexp, values)
    assert torch.autograd.gradgradcheck(logsumexp, values)


def test_logsumexp_of_nothing_passes_gradient_zero() -> None:
    values = torch.tensor([-torch.inf, 1.0, -torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
    lse = segment_logsumexp(values, segments_of([0, 0, 1, 1], 3))
    assert lse.tolist() == [1.0, -torch.inf, -torch.inf]
    lse.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_low_precision_do_not_saturate(dtype: torch.dtype) -> None:
    ones = torch.ones(1000, 2, dtype=dtype)
    total = segment_sum(ones, segments_of([0] * 1000, 1))
    assert total.dtype == dtype
    assert total.tolist() == [[1000.0, 1000.0]]


def test_forward_and_backward_repeat_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    segments = Segments.from_index(torch.randint(0, 50, (4000,), generator=generator), 50)
    values = torch.randn(4000, 5, generator=generator, requires_grad=True)
    rows = torch.randn(50, 5, generator=generator, requires_grad=True)
    results = []
    for _ in range(3):
        values.grad = rows.grad = None
        total = segment_sum(values, segments) + segment_logsumexp(values, segments)
        (total.square().sum() + (expand(rows, segments) * values.detach()).sum()).backward()
        assert values.grad is not None
        assert rows.grad is not None
        results.append((total.detach(), values.grad, rows.grad))
    assert all(torch.equal(a, b) for run in results[1:] for a, b in zip(run, results[0], strict=True))


def test_one_member_does_not_touch_another_segment() -> None:
    values = torch.tensor([1.0, torch.nan, 2.0])
    for reduce in (segment_sum, segment_logsumexp):
        assert torch.isnan(reduce(values, segments_of([0, 1, 2], 3))).tolist() == [False, True, False]


def test_wrong_rows_and_dtypes_are_named() -> None:
    segments = segments_of([0, 1, 1], 2)
    with pytest.raises(ValueError, match="values has 2 rows, but the segments have 3"):
        segment_sum(torch.zeros(2), segments)
    with pytest.raises(ValueError, match="rows has 3 rows, but the segments have 2"):
        expand(torch.zeros(3), segments)
    with pytest.raises(ValueError, match="int64"):
        segment_sum(torch.zeros(3, dtype=torch.int64), segments)


def test_connect_keeps_values_and_gives_sources_zero_gradients() -> None:
    result = torch.ones(2, requires_grad=True)
    source, ids = torch.ones(3, 2, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    connected = connect(result, source, None, ids)
    assert torch.equal(connected, result)
    connected.sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad, torch.zeros(3, 2))
    assert torch.equal(result.grad, torch.ones(2))
