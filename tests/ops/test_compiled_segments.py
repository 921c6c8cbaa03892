"""Compiled segment operators against float64 loops in torch, on every device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.ops import Segments, expand, segment_logsumexp, segment_sum

Ops = Callable[[str], Any]
FOLDS = {"segment_sum": segment_sum, "segment_logsumexp": segment_logsumexp}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# members of each segment: empty ones at both ends and in a row, one hot, all distinct, none at all
SHAPES = {
    "ragged": [0, 3, 1, 0, 0, 5, 2, 33, 1, 0],
    "hot": [1, 0, 5000, 2, 1],
    "two hot": [700, 0, 1300, 1],
    "very hot": [40, 9000, 3, 130, 0],  # fills whole blocks of pieces
    "bounds": [248, 8, 9, 256, 255, 0, 1, 64, 65, 257, 7],  # of what one thread, one warp and one tile reduce
    "distinct": [1] * 300,
    "many empty": [0] * 900 + [2] + [0] * 40,
    "one": [1],
    "no members": [0, 0],
    "no segments": [],
}


def segments_of(sizes: list[int], device: str, seed: int = 0) -> Segments:
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    index = index[torch.randperm(index.numel(), generator=torch.Generator().manual_seed(seed))]
    segments = Segments.from_index(index, len(sizes))
    return Segments(*(x.to(device) for x in segments.tensors()))


def normal(*shape: int, device: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def exact(name: str, values: Tensor, segments: Segments) -> Tensor:
    """Each segment reduced in float64, one at a time."""
    values, index = values.double().cpu(), segments.index.cpu()
    reduce = (lambda x: x.sum(0)) if name == "segment_sum" else (lambda x: torch.logsumexp(x, 0))
    rows = [reduce(values[index == s]) for s in range(segments.num_segments)]
    return torch.stack(rows) if rows else values[:0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (4,), (8,), (4, 16), (128,), (300,), (0,)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_folds_equal_float64_and_repeat(device: str, shape: str, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    segments = segments_of(SHAPES[shape], device)
    values = normal(segments.num_members, *trailing, device=device, dtype=dtype)
    for name, fold in FOLDS.items():
        result = fold(values, segments)
        assert result.dtype == dtype and result.device == values.device
        expected = exact(name, values, segments)
        scale = max([1.0, *(float(n) ** 0.5 for n in SHAPES[shape])]) if name == "segment_sum" else 10.0
        tolerance = TOLERANCE[dtype] * scale
        torch.testing.assert_close(result.double().cpu(), expected, rtol=TOLERANCE[dtype], atol=tolerance)
        assert all(torch.equal(fold(values, segments), result) for _ in range(20 if trailing == (128,) else 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (1,), (3,), (128,), (300,), (0,)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_expand_copies_rows(device: str, shape: str, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    segments = segments_of(SHAPES[shape], device)
    rows = normal(segments.num_segments, *trailing, device=device, dtype=dtype)
    assert torch.equal(expand(rows, segments), rows[segments.index])


def test_rows_that_are_not_aligned(device: str) -> None:
    segments = segments_of(SHAPES["ragged"], device)
    values = normal(segments.num_members * 8 + 1, device=device, dtype=torch.bfloat16)[1:].view(-1, 8)
    assert torch.equal(segment_sum(values, segments), segment_sum(values.clone(), segments))
    rows = normal(segments.num_segments * 8 + 1, device=device, dtype=torch.bfloat16)[1:].view(-1, 8)
    assert torch.equal(expand(rows, segments), rows[segments.index])
    across = normal(8, segments.num_members, device=device).t()  # strided
    torch.testing.assert_close(segment_sum(across, segments), segment_sum(across.contiguous(), segments))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_compiled_equals_plain_torch(
    device: str, compiled: Ops, plain: Ops, sizes: list[int], width: int, seed: int, absent: bool
) -> None:
    segments = segments_of(sizes, device, seed)
    values = normal(segments.num_members, width, device=device, seed=seed)
    if absent:
        values[::3] = -torch.inf
    rows = normal(len(sizes), width, device=device, seed=seed)
    for name, x in (("segment_sum", values), ("segment_logsumexp", values), ("expand", rows)):
        args = (x, *segments.tensors())
        torch.testing.assert_close(compiled(name)(*args), plain(name)(*args), rtol=1e-13, atol=1e-13)


def test_gradients_of_both_orders(device: str, compiled: Ops) -> None:
    segments = segments_of([2, 1, 4], device).tensors()
    values, rows = normal(7, 3, device=device).requires_grad_(), normal(3, 3, device=device).requires_grad_()
    for name, x in (("segment_sum", values), ("segment_logsumexp", values), ("expand", rows)):
        assert torch.autograd.gradcheck(lambda x, name=name: compiled(name)(x, *segments), x)
        assert torch.autograd.gradgradcheck(lambda x, name=name: compiled(name)(x, *segments), x)


@pytest.mark.parametrize("name", ["segment_sum", "segment_logsumexp", "expand"])
def test_torch_accepts_the_operator(device: str, compiled: Ops, name: str) -> None:
    segments = segments_of([0, 3, 1, 7], device)
    rows = segments.num_segments if name == "expand" else segments.num_members
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(rows, 5, device=device, dtype=dtype).requires_grad_()
        torch.library.opcheck(compiled(name).default, (x, *segments.tensors()))


def test_one_compiled_graph_holds_them(device: str) -> None:
    segments = segments_of([0, 3, 1, 7], device)

    def both(values: Tensor) -> Tensor:
        return expand(segment_sum(values, segments), segments) + segment_logsumexp(values, segments).sum()

    values = normal(segments.num_members, 5, device=device)
    torch.testing.assert_close(torch.compile(both, backend="eager", fullgraph=True)(values), both(values))


def test_nan_and_minus_infinity_stay_in_their_segment(device: str) -> None:
    segments = Segments(*(x.to(device) for x in Segments.from_index(torch.tensor([0, 1, 2, 2]), 3).tensors()))
    values = torch.tensor([1.0, torch.nan, -torch.inf, -torch.inf], device=device)
    assert torch.isnan(segment_sum(values, segments)).tolist() == [False, True, False]
    assert torch.isnan(segment_logsumexp(values, segments)).tolist() == [False, True, False]
    assert segment_logsumexp(values, segments)[2] == -torch.inf


@pytest.mark.parametrize("width", [1, 4, 24])
def test_parts_of_a_hot_segment_differ_by_more_than_exp_can_hold(device: str, width: int) -> None:
    """A segment in many parts: some all -inf, peaks 2000 apart; then +inf in one place, then NaN in another."""
    segments = Segments(*(x.to(device) for x in Segments.from_index(torch.zeros(9000).long(), 3).tensors()))
    values = normal(9000, width, device=device, dtype=torch.float32)
    values[:3000], values[3000:4000], values[7000:8000] = -torch.inf, values[3000:4000] - 1000, values[7000:8000] + 1000
    values[:, -1] = values[:, -1] - 1e5
    exact_ones = torch.logsumexp(values.double(), 0)
    result = segment_logsumexp(values, segments)
    torch.testing.assert_close(result[0].double(), exact_ones, rtol=1e-6, atol=1e-5)
    assert bool((result[1:] == -torch.inf).all())
    if device == "cuda":  # csrc/cpu gives NaN from the second +inf on
        values[[5000, 8500], 0] = torch.inf
        assert segment_logsumexp(values, segments)[0, 0] == torch.inf
        values[:, 0] = torch.where(values[:, 0] == torch.inf, 0.0, values[:, 0])
    values[100, 0] = torch.nan
    result = segment_logsumexp(values, segments)[0]
    assert result.isnan().tolist() == [True] + [False] * (width - 1)


@pytest.mark.parametrize("members", [20_000, 80_000, 160_000, 300_000])  # tiles of 4 to 32 members on CUDA
def test_long_tiles_cut_segments_anywhere(device: str, members: int) -> None:
    """Whole numbers, so that sums are exact in any order: lone rows and short ones, long ones, empty ones, in no order."""
    if device == "cpu" and members > 20_000:
        return
    sizes = torch.tensor([1, 1, 1, 2, 0, 1, 5, 1, 31, 1, 1, 32, 33, 0, 0, 1, 63, 64, 65, 3, 700, 1, 2, 9000])
    generator = torch.Generator().manual_seed(members)
    sizes = sizes[(torch.rand(members, generator=generator) ** 3 * len(sizes)).long()]
    index = torch.arange(len(sizes)).repeat_interleave(sizes)[:members]
    index = index[torch.randperm(members, generator=generator)].to(device)
    segments = Segments.from_index(index, len(sizes))
    values = torch.randint(-8, 9, (members, 128), generator=generator).float().to(device)
    expected = values.new_zeros(len(sizes), 128).index_add_(0, index, values)
    assert torch.equal(segment_sum(values, segments), expected)


@pytest.mark.parametrize("rest", [0, -1, 2**40])
@pytest.mark.parametrize("width", [1, 4, 128, 300])
@pytest.mark.parametrize("sizes", [[100], [2, 0, 300, 1, 0, 0], [3, 1, 1], [0, 0], [1] * 90 + [0] * 5000], ids=len)
def test_members_of_no_segment_are_left_out(device: str, sizes: list[int], width: int, rest: int) -> None:
    """As bounded spaces have them: behind offsets[U], where index and order say nothing (0 there; on CUDA anything goes)."""
    if device == "cpu" and rest != 0:
        return
    few = segments_of(sizes, "cpu")
    spare = torch.full((1500,), rest)
    more = Segments(torch.cat([few.index, spare]), torch.cat([few.order, spare]), few.offsets)
    more = Segments(*(x.to(device) for x in more.tensors()))
    values = normal(more.num_members, width, device=device)
    for name, fold in FOLDS.items():
        expected = exact(name, values[: few.num_members], few)
        torch.testing.assert_close(fold(values, more).cpu(), expected, rtol=1e-12, atol=1e-12)


def test_half_types_accumulate_in_float(device: str) -> None:
    segments = segments_of([3000], device)
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(3000, 1, dtype=dtype, device=device)
        assert segment_sum(ones, segments).item() == torch.tensor(3000.0, dtype=dtype).item()


@pytest.mark.parametrize(
    ("values", "order", "offsets", "expected"),
    [
        (torch.ones(3, dtype=torch.int64), torch.arange(3), torch.tensor([0, 3]), "pass floating"),
        (torch.ones(3, 1), torch.arange(2), torch.tensor([0, 2]), "order is"),
        (torch.ones(3, 1), torch.tensor([0, 1, 3]), torch.tensor([0, 3]), r"order\[2\] is 3"),
        (torch.ones(3, 1), torch.arange(3), torch.tensor([0, 4]), r"offsets\[1\] is 4"),
        (torch.ones(3, 1), torch.arange(3), torch.tensor([0, 2, 1]), r"offsets\[2\] is 1"),
    ],
)
def test_wrong_arguments_are_named(
    device: str, compiled: Ops, values: Any, order: Any, offsets: Any, expected: str
) -> None:
    if device == "cuda":  # what indices hold is looked at on the CPU only
        if "[" in expected:
            return
        values, order, offsets = (x.cuda() for x in (values, order, offsets))
    with pytest.raises((ValueError, IndexError), match=expected):
        compiled("segment_sum")(values, torch.zeros(3, dtype=torch.int64, device=device), order, offsets)
