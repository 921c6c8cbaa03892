"""Partial attention over disjoint keys merges into attention over all of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.attention import merge, weighted_attention


def bounds(n: int) -> Tensor:
    return torch.tensor([0, n], dtype=torch.int32)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 4), st.floats(0, 1), st.integers(0, 99))
def test_merged_parts_equal_the_whole(owner: list[int], queries: int, absent: float, seed: int) -> None:
    keys = len(owner)
    q, k, v = normal(queries, 2, 3, seed=seed), normal(keys, 2, 3, seed=seed + 1), normal(keys, 2, 3, seed=seed + 2)
    weight = 5 * normal(keys, 2, seed=seed + 3).detach()
    weight[torch.rand(keys, 2, generator=torch.Generator().manual_seed(seed)) < absent] = -torch.inf
    weight.requires_grad_()
    whole, whole_lse = weighted_attention(q, k, v, weight, bounds(queries), bounds(keys), return_lse=True)
    parts = []
    for rank in range(4):
        mine = torch.tensor([j for j, r in enumerate(owner) if r == rank], dtype=torch.int64)
        part = (k[mine], v[mine], weight[mine], bounds(queries), bounds(mine.numel()))
        parts.append(weighted_attention(q, *part, return_lse=True))
    out, lse = merge(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-12)
    a, c = normal(queries, 2, 3, seed=7).detach(), normal(queries, 2, seed=8).detach()
    finite = whole_lse > -torch.inf
    grads = [
        torch.autograd.grad((o * a).sum() + (s[finite] * c[finite]).sum(), (q, k, v, weight))
        for o, s in ((out, lse), (whole, whole_lse))
    ]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_partials_without_keys_give_zero_minus_infinity_and_no_gradient() -> None:
    outs = torch.zeros(3, 2, 1, 4, requires_grad=True)
    lses = torch.full((3, 2, 1), -torch.inf, requires_grad=True)
    out, lse = merge(outs, lses)
    assert not out.any()
    assert (lse == -torch.inf).all()
    (out.sum() + lse.clamp(min=-9).sum()).backward()
    assert outs.grad is not None
    assert lses.grad is not None
    assert not outs.grad.any()
    assert not lses.grad.any()


def test_an_empty_partial_does_not_count_whatever_it_holds() -> None:
    outs, lses = normal(2, 3, 1, 4, seed=0), normal(2, 3, 1, seed=1)
    padded_outs = torch.cat([outs.detach(), torch.full((1, 3, 1, 4), torch.nan)]).requires_grad_()
    padded_lses = torch.cat([lses.detach(), torch.full((1, 3, 1), -torch.inf)]).requires_grad_()
    out, lse = merge(padded_outs, padded_lses)
    expected, expected_lse = merge(outs, lses)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    for each, each_lse in ((out, lse), (expected, expected_lse)):
        (each.sin().sum() + each_lse.sin().sum()).backward()
    for padded, plain in ((padded_outs, outs), (padded_lses, lses)):
        assert padded.grad is not None and plain.grad is not None
        assert torch.equal(padded.grad[:2], plain.grad)
        assert not padded.grad[2].any()


def test_merging_is_associative() -> None:
    outs, lses = normal(3, 5, 2, 4, seed=0), 20 * normal(3, 5, 2, seed=1)
    out, lse = merge(outs, lses)
    first = merge(outs[:2], lses[:2])
    again = merge(torch.stack([first[0], outs[2]]), torch.stack([first[1], lses[2]]))
    torch.testing.assert_close(again, (out, lse), rtol=0, atol=1e-12)


def test_far_apart_log_sum_exps_do_not_overflow() -> None:
    outs = torch.tensor([[[[1.0]]], [[[3.0]]]])
    for shift in (-1e5, 0.0, 1e5):
        out, lse = merge(outs, torch.tensor([[[shift]], [[shift - 200]]]))
        assert float(out) == 1.0
        assert float(lse) == shift


def test_low_precision_partials_accumulate_in_float32() -> None:
    outs, lses = normal(64, 5, 2, 8, seed=0).bfloat16(), normal(64, 5, 2, seed=1).float()
    out, lse = merge(outs, lses)
    exact, exact_lse = merge(outs.double(), lses.double())
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding, at the end
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)
