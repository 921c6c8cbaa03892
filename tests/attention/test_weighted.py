"""The contract of weighted_attention: the reference against loops in float64, the torch kernel against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weighted_problems import Problem, absences, by_loops, cu_seqlens, gradients, heads, sizes, tensors, weights

from ta_plugin.attention import weighted_attention

BACKENDS = ["reference", "sdpa"]


def compare(call: dict[str, Any], expected: tuple[Tensor, Tensor], backend: str, atol: float) -> None:
    out, lse = weighted_attention(**call, return_lse=True, backend=backend)
    empty = expected[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    torch.testing.assert_close(out, expected[0], rtol=atol, atol=atol)
    torch.testing.assert_close(lse, expected[1], rtol=atol, atol=atol)
    for got, want in zip(gradients(out, lse, call), gradients(*expected, call), strict=True):
        torch.testing.assert_close(got, want, rtol=atol, atol=atol)


@settings(max_examples=40)
@given(sizes, heads, weights, absences, st.booleans(), st.integers(0, 99))
def test_reference_equals_loops(sizes: Any, heads: Any, weight: str, absent: float, causal: bool, seed: int) -> None:
    problem = Problem(sizes, *heads, weight=weight, absent=absent, causal=causal, seed=seed)
    call = tensors(problem)
    compare(call, by_loops(call), "reference", 1e-12)


@settings(max_examples=40)
@given(sizes, heads, weights, absences, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_reference_with_a_weight_per_chunk_of_queries_equals_loops(
    sizes: Any, heads: Any, weight: str, absent: float, chunks: int, prefix: bool, causal: bool, seed: int
) -> None:
    problem = Problem(sizes, *heads, weight, absent, chunks, prefix, causal, seed)
    call = tensors(problem)
    compare(call, by_loops(call), "reference", 1e-12)


@settings(max_examples=60)
@given(sizes, heads, weights, absences, st.integers(0, 99))
def test_sdpa_equals_reference(sizes: Any, heads: Any, weight: str, absent: float, seed: int) -> None:
    problem = Problem(sizes, *heads, weight=weight, absent=absent, seed=seed)
    call = tensors(problem, torch.float32, dim=8)
    expected = weighted_attention(**call, return_lse=True, backend="reference")
    compare(call, expected, "sdpa", 2e-5)


@settings(max_examples=60)
@given(sizes, heads, weights, absences, st.integers(0, 99))
def test_sdpa_with_a_causal_mask_equals_reference(
    sizes: Any, heads: Any, weight: str, absent: float, seed: int
) -> None:
    call = tensors(Problem(sizes, *heads, weight=weight, absent=absent, causal=True, seed=seed), torch.float32, dim=8)
    compare(call, weighted_attention(**call, return_lse=True, backend="reference"), "sdpa", 2e-5)


@settings(max_examples=80)
@given(sizes, heads, weights, absences, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_sdpa_with_a_weight_per_chunk_of_queries_equals_reference(
    sizes: Any, heads: Any, weight: str, absent: float, chunks: int, prefix: bool, causal: bool, seed: int
) -> None:
    problem = Problem(sizes, *heads, weight, absent, chunks, prefix, causal, seed)
    call = tensors(problem, torch.float32, dim=8)
    compare(call, weighted_attention(**call, return_lse=True, backend="reference"), "sdpa", 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradients_flow_through_out_or_lse_alone(backend: str, through: str) -> None:
    problem = Problem(((4, 5), (2, 7)), weight="per_head")
    call, exact = tensors(problem, torch.float32, dim=8), tensors(problem, torch.float64, dim=8)
    grads = []
    for c, result in ((call, weighted_attention(**call, return_lse=True, backend=backend)), (exact, by_loops(exact))):
        chosen = result[0] if through == "out" else result[1]
        inputs = [c["q"], c["k"], c["v"], c["log_weight"]]
        grads.append(torch.autograd.grad(chosen.square().sum(), inputs, allow_unused=True))
    for got, want in zip(*grads, strict=True):
        if want is None or got is None:
            assert got is None or not got.any()
            assert want is None or not want.any()
        else:
            torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_a_keyword(backend: str) -> None:
    call = tensors(Problem(((4, 5), (2, 7))), torch.float32)
    call["scale"] = 1.7
    torch.testing.assert_close(weighted_attention(**call, backend=backend), by_loops(call)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("chunks", [0, 2])
def test_sdpa_with_a_scale_that_is_not_positive_equals_reference(scale: float, chunks: int) -> None:
    call = tensors(Problem(((4, 5), (2, 7)), chunks=chunks), torch.float32, dim=8) | {"scale": scale}
    compare(call, weighted_attention(**call, return_lse=True, backend="reference"), "sdpa", 2e-5)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", ["none", "shared"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_matter(backend: str, weight: str, default: torch.dtype) -> None:
    problem = Problem(((4, 4), (2, 2)), weight=weight, chunks=2, prefix=True, causal=True)
    call = tensors(problem, torch.float32, dim=8)
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            found = weighted_attention(**call, return_lse=True, backend=backend)
            results.append([*found, *gradients(*found, call)])
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)  # and of one dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_up_to_log_ten_million(backend: str, dtype: torch.dtype) -> None:
    call = tensors(Problem(((3, 40),)), dtype, dim=16)
    counts = torch.logspace(0, 7, 40, dtype=torch.float64).round()
    call["log_weight"] = counts.log().float()
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in call.items()}
    exact["log_weight"] = counts.log()
    want, want_lse = by_loops(exact)
    out, lse = weighted_attention(**call, return_lse=True, backend=backend)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)  # float32 at 16 resolves 1e-6
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_tell_counts_above_256_apart(backend: str, dtype: torch.dtype) -> None:
    counts = torch.tensor([257.0, 300.0, 1.0, 5000.0, 5001.0])
    q, k = torch.zeros(2, 1, 32, dtype=dtype), torch.zeros(5, 1, 32, dtype=dtype)
    v = torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds = cu_seqlens([2]), cu_seqlens([5])
    out, lse = weighted_attention(q, k, v, counts.log(), *bounds, return_lse=True, backend=backend)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse, counts.sum().log().expand(2, 1), rtol=0, atol=1e-5)  # bf16 weights miss by 0.01
    mean = (counts[:, None] * v[:, 0].float()).sum(0) / counts.sum()
    torch.testing.assert_close(out[0, 0].float(), mean, rtol=0, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_without_keys_or_queries(backend: str) -> None:
    for lengths in ((), ((0, 0),), ((3, 0),), ((0, 3),), ((2, 0), (0, 2)), ((2, 3), (4, 0), (0, 5), (1, 1))):
        call = tensors(Problem(lengths), torch.float32)
        out, lse = weighted_attention(**call, return_lse=True, backend=backend)
        keyless = torch.cat(
            [torch.full((n_q,), n_k == 0) for n_q, n_k in lengths] or [torch.zeros(0, dtype=torch.bool)]
        )
        assert torch.equal((lse == -torch.inf).all(1), keyless)
        assert not out[keyless].any()
        grads = torch.autograd.grad(out.sum(), [call["q"], call["k"], call["v"], call["log_weight"]])
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[0][keyless].any()


def nan_run(call: dict[str, Any], backend: str) -> list[Tensor]:
    out, lse = weighted_attention(**call, return_lse=True, backend=backend)
    return [out.detach(), lse.detach(), *gradients(out, lse, call)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", ["none", "shared", "per_head"])
def test_a_nan_row_reaches_only_its_own_sample(backend: str, weight: str) -> None:
    problem = Problem(((3, 4), (2, 6), (4, 5)), weight=weight)
    clean = nan_run(tensors(problem, torch.float32, dim=8), backend)
    for name in ("k", "v", "q"):
        call = tensors(problem, torch.float32, dim=8)
        row = 3 if name == "q" else 6  # in the second sample
        with torch.no_grad():
            call[name][row] = torch.nan
        got = nan_run(call, backend)
        assert torch.isnan(got[0][3]).all()
        if name != "q":
            assert torch.isnan(got[0][3:5]).all()
        queries, keys = torch.ones(9, dtype=torch.bool), torch.ones(15, dtype=torch.bool)
        queries[3:5], keys[4:10] = False, False
        for x, y in zip(got, clean, strict=True):
            others = queries if x.shape[0] == 9 else keys
            assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", ["shared", "per_head"])
def test_a_nan_row_of_weight_minus_infinity_reaches_nothing(backend: str, weight: str) -> None:
    problem = Problem(((3, 4), (2, 6)), weight=weight)
    runs = []
    for value in (0.0, torch.nan):
        call = tensors(problem, torch.float32, dim=8)
        with torch.no_grad():
            call["log_weight"][6] = -torch.inf
            call["k"][6] = call["v"][6] = value
        runs.append(nan_run(call, backend))
    assert all(torch.isfinite(x).all() for x in runs[1])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_no_chunk_sees_reach_nothing() -> None:
    call = tensors(Problem(((3, 4), (2, 6)), chunks=2))
    call["k_visible"] = torch.tensor([1, 3], dtype=torch.int32)
    with torch.no_grad():
        call["k"][[3, 7]] = call["v"][[3, 7]] = torch.nan  # the fourth key of each sample
    assert all(torch.isfinite(x).all() for x in nan_run(call, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_repeat_bit_for_bit(backend: str) -> None:
    problem = Problem(((30, 40), (5, 33), (17, 64)), weight="per_head")
    runs = [nan_run(tensors(problem, torch.float32, dim=16), backend) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_values_may_be_wider_than_keys() -> None:
    call = tensors(Problem(((3, 4), (2, 6))))
    call["v"] = torch.arange(140.0, dtype=torch.float64).sin().view(10, 2, 7).requires_grad_()
    compare(call, by_loops(call), "reference", 1e-12)
    torch.testing.assert_close(weighted_attention(**call), by_loops(call)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(5, 8)}, "q is torch.float32 of shape (5, 8)"),
        ({"q": torch.zeros(5, 3, 4)}, "q has 3 heads and k 2"),
        ({"k": torch.zeros(10, 2, 5)}, "q and k share head_dim"),
        ({"v": torch.zeros(9, 2, 4)}, "k and v rows and heads"),
        ({"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, "bounds 1 samples, cu_seqlens_k 2"),
        ({"log_weight": torch.zeros(9)}, "log_weight has shape (9,); pass (K,) or (K, H), K = 10, H = 2"),
        ({"log_weight": torch.zeros(10, dtype=torch.bfloat16)}, "bf16 cannot tell counts above 256 apart"),
        ({"q_chunk": torch.zeros(4, dtype=torch.int64), "log_weight": torch.zeros(1, 10)}, "one chunk per query"),
        ({"k_visible": torch.zeros(1, dtype=torch.int32)}, "k_visible is given without q_chunk"),
        ({"causal": True}, "cu_seqlens_q and cu_seqlens_k differ"),
    ],
)
def test_what_disagrees_is_named(change: dict[str, Any], match: str) -> None:
    call = tensors(Problem(((3, 4), (2, 6))), torch.float32)
    with pytest.raises(ValueError) as error:
        weighted_attention(**(call | change))
    assert match in str(error.value)


def test_lse_is_in_natural_units() -> None:
    q, k, v = torch.zeros(1, 1, 4), torch.zeros(3, 1, 4), torch.ones(3, 1, 4)
    _, lse = weighted_attention(q, k, v, None, cu_seqlens([1]), cu_seqlens([3]), return_lse=True)
    assert float(lse) == pytest.approx(math.log(3), abs=1e-6)
