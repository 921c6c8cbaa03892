"""The wrapper of the Hopper kernel with a float64 stand-in for it: padding, chunks, strides and gradients, without a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hopper_stand_in import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weighted_problems import Problem, absences, by_loops, gradients, heads, tensors, weights

from ta_plugin.attention.backends.hopper import hopper_attention, padded_dim
from ta_plugin.attention.runs import Runs

sizes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=3).map(tuple)


def attend(call: dict[str, Any], log: list[dict[str, Any]] | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """As `weighted_attention` calls the wrapper."""
    call = dict(call)
    chunk, num_chunks = call.pop("q_chunk", None), 0
    if chunk is not None:
        rows = call["log_weight"] if call["log_weight"] is not None else call["k_visible"]
        num_chunks = rows.shape[0]
        options["runs"] = Runs.of(chunk, num_chunks, call["cu_seqlens_q"])
    call.setdefault("scale", call["q"].shape[2] ** -0.5)
    return hopper_attention(stand_in(log), **call, **options)


def compare(call: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    out, lse = attend(call, log, **options)
    expected = by_loops(call)
    assert out.shape == expected[0].shape
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-5)
    for got, want in zip(gradients(out, lse.double(), call), gradients(*expected, call), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    return log


@settings(max_examples=30)
@given(sizes, heads, weights, absences, st.booleans(), st.sampled_from([3, 64, 70, 128]), st.integers(0, 99))
def test_packed_calls(sizes: Any, heads: Any, weight: str, absent: float, causal: bool, dim: int, seed: int) -> None:
    call = tensors(Problem(sizes, *heads, weight=weight, absent=absent, causal=causal, seed=seed), dim=dim)
    log = compare(call)
    assert {entry["dim"] for entry in log if "dim" in entry} == {padded_dim(dim, dim)}


@settings(max_examples=30)
@given(sizes, heads, weights, absences, st.lists(st.integers(0, 2), max_size=3), st.booleans(), st.integers(0, 99))
def test_chunks(sizes: Any, heads: Any, weight: str, absent: float, splits: Any, prefix: bool, seed: int) -> None:
    """Each sample's queries are cut into chunks, empty ones among them."""
    chunk, chunks = [], 0
    for queries, _ in sizes:
        bounds = sorted({0, queries, *(s for s in splits if s <= queries)})
        for a, b in pairwise(bounds):
            chunk += [chunks] * (b - a)
            chunks += 1
        chunks += len(splits) % 2  # a chunk without queries
    chunks = max(chunks, 1)
    problem = Problem(sizes, *heads, weight, absent, chunks, prefix or weight == "none", False, seed)
    call = tensors(problem, dim=8)
    call["q_chunk"] = torch.tensor(chunk, dtype=torch.int64)
    compare(call)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 6), max_size=3), heads, weights, absences, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99)
)  # fmt: skip
def test_rows_shared_by_runs_and_causal_runs(
    lengths: Any, heads: Any, weight: str, absent: float, prefix: bool, causal: bool, sorted_: bool, seed: int
) -> None:
    """Any query with any row of weights, and causal; `sorted_`: the rows ascend within and over samples, some of them unused."""
    problem = Problem(
        tuple((n, n) for n in lengths), *heads, weight, absent, 6, prefix or weight == "none", causal, seed
    )
    call = tensors(problem, dim=8)
    if sorted_:
        sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        call["q_chunk"] = (call["q_chunk"] % 2 + 2 * sample).sort().values
    compare(call)


def test_values_wider_or_narrower_than_keys() -> None:
    for dim, value_dim, width in ((8, 70, 96), (80, 8, 96), (64, 64, 64)):
        call = tensors(Problem(((3, 4), (2, 6))), dim=dim)
        values = torch.randn(10, 2, value_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        call["v"] = values.requires_grad_()
        log = compare(call)
        assert log[0]["dim"] == width


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1.3])
def test_scales_the_kernel_does_not_take(scale: float) -> None:
    call = tensors(Problem(((3, 4), (2, 6)), weight="per_head"))
    compare(call | {"scale": scale})


def test_rows_that_the_copy_engine_cannot_read_are_copied() -> None:
    call = tensors(Problem(((3, 4), (2, 6))), dim=64)
    odd = torch.randn(5, 2, 2, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    call["q"] = (
        odd[:, 1, :, 1:].detach().requires_grad_()
    )  # neither its start nor its strides are multiples of 16 bytes
    shifted = torch.randn(10 * 2 * 64 + 1, dtype=torch.float64)[1:].view(10, 2, 64)
    call["k"] = shifted.requires_grad_()  # contiguous, but starts at an odd address
    compare(call)
    out, lse = attend(call)
    (out.transpose(0, 1).sum() + lse.sum()).backward()  # an expanded gradient, of stride 0


def test_expanded_weights_are_written_out() -> None:
    call = tensors(Problem(((3, 4), (2, 6)), weight="shared"), dim=64)
    call["log_weight"] = call["log_weight"][:, None].expand(-1, 2)
    compare(call)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_the_kernel_is_asked_for_no_more_than_is_needed(through: str) -> None:
    call = tensors(Problem(((3, 4), (2, 6)), weight="shared"), dim=64)
    for weight_grad in (False, True):
        log: list[dict[str, Any]] = []
        call["log_weight"].requires_grad_(weight_grad)
        out, lse = attend(call, log, deterministic=weight_grad)
        (out if through == "out" else lse).sum().backward()
        wanted = {"need": weight_grad, "deterministic": weight_grad, "dlse": through == "lse"}
        assert log[1] == {"pass": "backward", **wanted}


def test_head_dims_beyond_the_kernel_are_refused() -> None:
    assert [padded_dim(d, 8) for d in (1, 64, 65, 96, 97, 128, 129)] == [64, 64, 96, 96, 128, 128, None]
    with pytest.raises(ValueError, match="head_dim is 130"):
        attend(tensors(Problem(((3, 4),)), dim=130))
