"""Buckets of fixed sizes, compiled and in torch: where items go, and what arrives together, against plain loops and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.ops.buckets import BOUNDS, BUCKET, COMPACT, SPREAD
from ta_plugin.ops.registry import Operator

FORMS = ("compiled", "plain")
problems = st.tuples(
    st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=4),  # owners of each sample's items
    st.integers(0, 3),  # items behind the samples
    st.integers(1, 9),  # places in a bucket
    st.integers(4, 5),  # ranks
)


def in_form(operator: Operator, form: str) -> Callable[..., Any]:
    return operator.plain if form == "plain" else operator


def bucket(
    call: Callable[..., None], owner: Tensor, cu_seqlens: Tensor, ranks: int, bound: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The item in each place (N, C), sizes (N, B), most (1,)."""
    take, most = owner.new_full((ranks, bound), -1), owner.new_full((1,), -1)
    sizes = owner.new_full((ranks, cu_seqlens.numel() + 1), -1)[:, 1:-1]  # a part of each rank's bucket
    call(owner, cu_seqlens, [torch.arange(owner.numel(), device=owner.device)], [take], sizes, most)
    return take, sizes, most


def bounds_of(samples: list[list[int]]) -> Tensor:
    return torch.tensor([0, *(len(s) for s in samples)]).cumsum(0).int()


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(problems)
def test_items_stand_in_their_owners_bucket_in_order(
    device: str, form: str, problem: tuple[list[list[int]], int, int, int]
) -> None:
    samples, spare, bound, ranks = problem
    owners = [r for sample in samples for r in sample]
    items = owners + [0] * max(spare, 1 - len(owners))
    wanted = [[i for i, r in enumerate(owners) if r == rank] for rank in range(ranks)]
    take, sizes, most = (
        x.cpu()
        for x in bucket(
            in_form(BUCKET, form), torch.tensor(items, device=device), bounds_of(samples).to(device), ranks, bound
        )
    )
    assert take.shape == (ranks, bound) and int(take.min()) >= 0 and int(take.max()) < len(items)
    assert int(most) == max(map(len, wanted))
    counts = [[sum(r == rank for r in sample) for sample in samples] for rank in range(ranks)]
    fits = int(most) <= bound
    assert sizes.shape == (ranks, len(samples))
    assert sizes.tolist() == (counts if fits else [[0] * len(samples) for _ in range(ranks)])
    for places, mine in zip(take.tolist(), wanted, strict=True):
        assert places[: len(mine)] == mine[:bound]


@pytest.mark.parametrize("form", FORMS)
def test_items_without_an_owner_go_nowhere(device: str, form: str) -> None:
    owner = torch.tensor([1, -1, 0, 2, 1, 5], device=device)
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
    take, sizes, most = bucket(in_form(BUCKET, form), owner, cu_seqlens, 2, 4)
    assert sizes.tolist() == [[1, 0], [1, 1]] and most.tolist() == [2]
    assert take[0, 0] == 2 and take[1, :2].tolist() == [0, 4]


@pytest.mark.parametrize("form", FORMS)
def test_values_stand_in_their_items_places(device: str, form: str) -> None:
    """Rows of a larger buffer; int64 become int32, and what does not fit -1."""
    owner = torch.tensor([1, 0, 1, 1, 0], device=device)
    ids = torch.tensor([5, 2**31 - 1, 2**31, -7, 2**40 + 3], device=device)
    values = [ids, ids, torch.arange(5.0, device=device), torch.arange(5, device=device).double()]
    wire = [torch.int32, torch.int64, torch.float32, torch.float64]
    buckets = [torch.zeros(2, 6, dtype=dtype, device=device)[:, 2:] for dtype in wire]
    sizes, most = ids.new_zeros(2, 1), ids.new_zeros(1)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32, device=device)
    in_form(BUCKET, form)(owner, cu_seqlens, values, buckets, sizes, most)
    narrow, same, floats, doubles = buckets
    assert narrow[0, :2].tolist() == [2**31 - 1, -1] and narrow[1, :3].tolist() == [5, -1, -1]
    assert same[0, :2].tolist() == [2**31 - 1, 2**40 + 3] and same[1, :3].tolist() == [5, 2**31, -7]
    for found in (floats, doubles):
        assert found[0, :2].tolist() == [1, 4] and found[1, :3].tolist() == [0, 2, 3]
    assert sizes.tolist() == [[2], [3]] and most.tolist() == [3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("ranks", "samples"), [(1, 0), (1, 1), (3, 5), (2, 70_000)])
def test_bounds_begin_each_part(device: str, form: str, ranks: int, samples: int) -> None:
    wide = torch.randint(0, 9, (ranks, samples + 2), generator=torch.Generator().manual_seed(samples)).to(device)
    for sizes in (wide[:, 1:-1], wide[:, 1:-1].reshape(-1)):
        found, flat = in_form(BOUNDS, form)(sizes), sizes.reshape(-1)
        assert found.dtype == torch.int32 and torch.equal(found.diff().long(), flat)
        assert int(found[0]) == 0 and found.numel() == flat.numel() + 1


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_what_arrives_is_brought_together_and_its_gradient_goes_back(
    device: str, form: str, sizes: list[list[int]], spare: int, width: int
) -> None:
    """sizes[r][b] rows of sample b came from rank r."""
    ranks, bound, compact = len(sizes), max(1, max(map(sum, sizes)) + spare), in_form(COMPACT, form)
    cu_seqlens = torch.tensor([0, *(n for each in sizes for n in each)], device=device).cumsum(0).int()
    wide = torch.randn(ranks, bound + 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    buckets = wide[:, 1:-1].detach().requires_grad_()  # rows of a larger buffer
    together = compact(buckets, cu_seqlens)
    wanted = torch.cat([buckets[r, : sum(each)] for r, each in enumerate(sizes)]).detach()
    assert together.shape == (ranks * bound, width)
    assert torch.equal(together[: len(wanted)], wanted) and not together[len(wanted) :].any()
    grad = torch.randn(together.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    (back,) = torch.autograd.grad(together, buckets, grad)
    begin = 0
    for r, each in enumerate(sizes):
        assert torch.equal(back[r, : sum(each)], grad[begin : begin + sum(each)]) and not back[r, sum(each) :].any()
        begin += sum(each)
    integers = wide[:, 1:-1, 0].mul(1000).long()
    assert torch.equal(compact(integers, cu_seqlens), (compact(wide[:, 1:-1, 0], cu_seqlens) * 1000).long())
    widened = compact(integers.int(), cu_seqlens, True)
    assert widened.dtype == torch.int64 and torch.equal(widened, compact(integers, cu_seqlens))


@pytest.mark.parametrize(
    ("ranks", "n", "samples", "behind"),
    [
        (1, 1, 1, 0),
        (2, 70_001, 5, 1000),
        (7, 300_000, 256, 0),
        (1000, 50_000, 3, 7),
        (3, 5000, 3000, 0),
        (3, 4096, 2, 0),  # ends where a tile of the kernel ends
        (2, 600_000, 3, 5),  # more tiles than a block scans at once
    ],
)
def test_kernels_equal_the_torch_form(device: str, ranks: int, n: int, samples: int, behind: int) -> None:
    """behind: items behind the samples."""
    g = torch.Generator(device).manual_seed(n)
    owner = torch.randint(0, ranks, (n,), generator=g, device=device)
    ends = torch.randint(0, n - behind + 1, (samples,), generator=g, device=device).sort().values
    ends[-1] = n - behind
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    for bound in (n, n // ranks // 2 + 1):
        if ranks * bound >= 2**31:
            continue
        bound = min(bound, 20 * n // ranks + 20)
        found, expected = (bucket(f, owner, cu_seqlens, ranks, bound) for f in (BUCKET, BUCKET.in_torch))
        sent = torch.bincount(owner[: int(ends[-1])], minlength=ranks)
        filled = torch.arange(bound, device=device) < sent[:, None]
        for ours, exact in zip((found[0][filled], *found[1:]), (expected[0][filled], *expected[1:]), strict=True):
            assert torch.equal(ours, exact)
        assert int(found[0].min()) >= 0 and int(found[0].max()) < n
        received = torch.cat([ends.new_zeros(1), found[1].flatten().cumsum(0)]).int()
        for dtype, shape in (
            (torch.int64, ()),
            (torch.int32, ()),
            (torch.bfloat16, (3,)),
            (torch.float32, (2, 4)),
            (torch.bool, ()),
        ):
            buckets = torch.randint(0, 2, (ranks, bound, *shape), generator=g, device=device).to(dtype)
            together = COMPACT(buckets, received)
            assert torch.equal(together, COMPACT.in_torch(buckets, received))
            assert torch.equal(SPREAD(together, received, ranks), SPREAD.in_torch(together, received, ranks))
