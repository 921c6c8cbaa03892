"""The compiled merge against float64 and against its torch form, on every device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.attention import merge

Ops = Callable[[str], Any]
HALVES = [torch.bfloat16, torch.float16]


def partials(
    shape: tuple[int, ...], absent: float, device: str, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """outs (N, Q, H, D) and lses (N, Q, H) of which a share is absent; absent outs are NaN: reading one would show."""
    g = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(*shape, generator=g).double(), 5 * torch.randn(*shape[:3], generator=g).double()
    gone = torch.rand(*shape[:3], generator=g) < absent
    lses[gone], outs[gone] = -torch.inf, torch.nan
    wide = torch.promote_types(dtype, torch.float32)
    return outs.to(device, dtype), lses.to(device, wide)


def gradients(function: Callable[..., Any], outs: Tensor, lses: Tensor, *rest: Any) -> list[Tensor]:
    outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
    out, lse = function(outs, lses, *rest)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (outs, lses), arriving(out, lse))]


def arriving(out: Tensor, lse: Tensor) -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randn(*x.shape, generator=g).to(x) for x in (out, lse)]


def in_torch(plain: Ops, outs: Tensor, lses: Tensor) -> list[Tensor]:
    """As `gradients` of merge; autograd would go back by the compiled operator, which is under test."""
    out, lse = plain("merge")(outs, lses, None)
    return [out, lse, *plain("merge_backward")(*arriving(out, lse), outs, lses, lse)]


shapes = st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.sampled_from([0, 1, 3, 8, 33]))


@settings(max_examples=60)
@given(shapes, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_compiled_equals_plain_torch(
    device: str, compiled: Ops, plain: Ops, shape: tuple[int, ...], absent: float, seed: int
) -> None:
    outs, lses = partials(shape, absent, device, seed=seed)
    ours = gradients(compiled("merge"), outs, lses, None)
    for got, want in zip(ours, in_torch(plain, outs, lses), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", ["compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 2, 8), (3, 5, 2, 7), (9, 5, 2, 20)], ids=str)
def test_absent_partials_get_no_gradient_whatever_arrives(
    device: str, compiled: Ops, plain: Ops, form: str, shape: Any, dtype: torch.dtype
) -> None:
    outs, lses = partials(shape, 0.0, device, dtype)
    lses[:, 1], outs[:, 1] = -torch.inf, torch.nan  # all of one query, and one partial of another
    lses[0, 2], outs[0, 2] = -torch.inf, torch.nan
    gone = lses == -torch.inf
    op = compiled if form == "compiled" else plain
    out, lse = op("merge")(outs, lses, None)
    d_out, d_lse = torch.ones_like(out), torch.ones_like(lse)
    d_out[1] = d_lse[1] = torch.nan  # as after log(0) or 0 / 0 downstream
    for grad in op("merge_backward")(d_out, d_lse, outs, lses, lse):
        assert bool((grad[gone] == 0).all()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(2, 77, 4, 128), (8, 5, 3, 64), (3, 9, 2, 20), (4, 6, 1, 7)], ids=str)
def test_low_precision_is_one_rounding_away_from_float64(
    device: str, plain: Ops, shape: Any, dtype: torch.dtype
) -> None:
    outs, lses = partials(shape, 0.3, device, dtype)
    exact = in_torch(plain, outs.double(), lses.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for result in ("same", *(HALVES if dtype == torch.float32 else [])):
        into = dtype if result == "same" else result
        assert isinstance(into, torch.dtype)
        ours = gradients(merge, outs, lses, into)
        assert [x.dtype for x in ours] == [into, lses.dtype, dtype, lses.dtype]
        for got, want, loose in zip(ours, exact, (False, False, False, True), strict=True):
            bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(into, tolerance)  # gradients arrive rounded
            scale = 1e-5 if got.dtype == torch.float32 and into in HALVES and loose else 0.0
            atol = max(bound * (8 if loose or into != dtype else 1), scale)
            torch.testing.assert_close(got.double(), want, rtol=2 * bound, atol=atol)
        assert all(
            torch.equal(a, b) for _ in range(20) for a, b in zip(gradients(merge, outs, lses, into), ours, strict=True)
        )


@settings(max_examples=40)
@given(
    shapes,
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float64, torch.float32, *HALVES]),
    st.integers(0, 99),
)
def test_merging_in_place_equals_merging_apart(
    device: str, compiled: Ops, plain: Ops, shape: tuple[int, ...], absent: float, dtype: torch.dtype, seed: int
) -> None:
    outs, lses = partials((2, *shape[1:]), absent, device, dtype, seed)
    outs = torch.where(lses[..., None] == -torch.inf, 0.0, outs)  # an absent partial is 0 where it is written
    outs[1] = torch.where(
        lses[1, ..., None] == -torch.inf, torch.nan, outs[1]
    )  # and may hold anything where it is read
    want = merge(outs, lses)
    for op in (compiled, plain):
        out, lse = outs[0].clone(), lses[0].clone()
        op("merge_into")(out, lse, outs[1], lses[1])
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(out, want[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, want[1], rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-6)


def test_gradients_of_both_orders(device: str, compiled: Ops) -> None:
    outs, lses = partials((3, 2, 2, 3), 0.0, device)
    outs.requires_grad_(), lses.requires_grad_()
    assert torch.autograd.gradcheck(lambda o, s: compiled("merge")(o, s, None), (outs, lses))
    assert torch.autograd.gradgradcheck(lambda o, s: compiled("merge")(o, s, None), (outs, lses))


def test_torch_accepts_the_operators(device: str, compiled: Ops) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        outs, lses = partials((2, 3, 2, 8), 0.0, device, dtype)
        args = (outs.requires_grad_(), lses.requires_grad_(), torch.bfloat16)
        torch.library.opcheck(compiled("merge").default, args)
        out, lse = merge(outs.detach(), lses.detach())
        torch.library.opcheck(compiled("merge_into").default, (out.clone(), lse.clone(), out, lse))
        torch.library.opcheck(compiled("merge_backward").default, (out, lse, outs.detach(), lses.detach(), lse))


def test_strided_partials_are_read_right(device: str) -> None:
    outs, lses = partials((4, 3, 2, 9), 0.2, device)
    strided = outs.transpose(0, 1).contiguous().transpose(0, 1)[..., 1:]
    for got, want in zip(merge(strided, lses), merge(strided.contiguous(), lses), strict=True):
        torch.testing.assert_close(got, want)


def test_shapes_that_do_not_fit_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"pass \(N, Q, H, D\)"):
        merge(torch.zeros(2, 3, 1, 4, device=device), torch.zeros(2, 3, 2, device=device))
    with pytest.raises(ValueError, match="no partials"):
        merge(torch.zeros(0, 3, 1, 4, device=device), torch.zeros(0, 3, 1, device=device))
