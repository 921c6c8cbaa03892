"""Buckets of fixed sizes, compiled and in torch: where items go, and what arrives together, against plain loops and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.ops.buckets import BUCKET, COMPACT, SPREAD
from ta_plugin.ops.registry import Operator
from ta_plugin.routing import BoundedRoute

FORMS = ("compiled", "plain")
problems = st.tuples(
    st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=4),  # owners of each sample's items
    st.integers(0, 3),  # items behind the samples
    st.integers(1, 9),  # places in a bucket
    st.integers(4, 5),  # ranks
)


def in_form(operator: Operator, form: str) -> Callable[..., Any]:
    return operator.plain if form == "plain" else operator


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
        for x in in_form(BUCKET, form)(torch.tensor(items, device=device), bounds_of(samples).to(device), ranks, bound)
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
    take, sizes, most = in_form(BUCKET, form)(owner, torch.tensor([0, 3, 5], dtype=torch.int32, device=device), 2, 4)
    assert sizes.tolist() == [[1, 0], [1, 1]] and most.tolist() == [2]
    assert take[0, 0] == 2 and take[1, :2].tolist() == [0, 4]


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


def test_a_route_fills_buckets_and_passes_gradients_of_what_went() -> None:
    route = BoundedRoute.build(torch.tensor([1, 0, 1, 0]), torch.tensor([0, 2, 3], dtype=torch.int32), 2, 2)
    values = torch.arange(8.0).view(4, 2).requires_grad_()
    filled = route.fill(values)
    assert isinstance(filled, Tensor)
    assert filled[0, 0].tolist() == [2, 3] and filled[1].tolist() == [[0, 1], [4, 5]]
    filled[1].sum().backward()
    assert values.grad is not None and values.grad[:, 0].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("ranks", "n", "samples"), [(1, 1, 1), (2, 70_001, 5), (7, 300_000, 256), (1000, 50_000, 3), (3, 5000, 3000)]
)
def test_kernels_equal_the_torch_form(device: str, ranks: int, n: int, samples: int) -> None:
    g = torch.Generator(device).manual_seed(n)
    owner = torch.randint(0, ranks, (n,), generator=g, device=device)
    ends = torch.randint(0, n + 1, (samples,), generator=g, device=device).sort().values
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    for bound in (n, n // ranks // 2 + 1):
        if ranks * bound >= 2**31:
            continue
        bound = min(bound, 20 * n // ranks + 20)
        found, expected = (f(owner, cu_seqlens, ranks, bound) for f in (BUCKET, BUCKET.in_torch))
        sent = torch.bincount(owner[: int(ends[-1])], minlength=ranks)
        filled = torch.arange(bound, device=device) < sent[:, None]
        for ours, exact in zip((found[0][filled], *found[1:]), (expected[0][filled], *expected[1:]), strict=True):
            assert torch.equal(ours, exact)
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
