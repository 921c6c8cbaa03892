"""Causal attention in unique space against plain causal attention over positions, in float64; its memory, chunks and range."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import written_out_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ta_plugin import UniqueSpace
from ta_plugin.attention import CausalChunks, alibi_slopes, causal_attention
from ta_plugin.attention.causal_parts import KernelParts, parts_for
from ta_plugin.attention.chunks import cut
from ta_plugin.attention.prefix import Decay, PrefixCounts, PrefixDecay
from ta_plugin.attention.weighted import weighted_attention


def plain(
    space: UniqueSpace, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every score of every pair of positions."""
    repeat = q.shape[1] // k.shape[1]
    keys, values = (space.as_packed().expand(x).repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * q.shape[2] ** -0.5
    if decay is not None:
        t = (space.positions() if times is None else times).to(q.dtype)
        scores = scores - decay.to(q.dtype)[:, None, None] * (t[:, None] - t)
    place, sample = torch.arange(q.shape[0]), space.sample_of_occurrences()
    seen = (place[:, None] >= place) & (sample[:, None] == sample)
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), values), scores.logsumexp(-1).T


def inputs_of(
    space: UniqueSpace, heads: int, kv_heads: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((space.num_occurrences, heads, 4), (space.num_rows, kv_heads, 4), (space.num_rows, kv_heads, 4))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(
    space: UniqueSpace,
    inputs: list[Tensor],
    decay: Tensor | None,
    through: str,
    dout: Tensor | None = None,
    **options: Any,
) -> None:
    """Outputs and gradients through out, lse or both; dout (M, H, D + 1) gives a gradient of out that is a strided view."""
    got = causal_attention(space, *inputs, decay=decay, return_lse=True, **options)
    want = plain(space, *inputs, decay, options.get("times"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    which = {"out": [0], "lse": [1], "both": [0, 1]}[through]
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(want[i].shape, generator=g, dtype=torch.float64) for i in which]
    if dout is not None:
        weights[0] = dout.to(inputs[0].dtype)[..., 1:]
    leaves = inputs + ([] if decay is None or not decay.requires_grad else [decay])
    grads = [
        torch.autograd.grad([x[i] for i in which], leaves, weights, allow_unused=True, materialize_grads=True)
        for x in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


documents = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(0, 24)), min_size=1, max_size=4)
decays = st.sampled_from(["none", "alibi", "learned", "growing"])


@settings(max_examples=60)
@given(
    documents,
    st.sampled_from([1, 3, 50]),
    st.integers(1, 9),
    st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    decays,
    st.sampled_from(["out", "lse", "both"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_equals_plain_causal_attention(
    lengths: list[int], vocabulary: int, chunk: int, heads: Any, kind: str, through: str, timed: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    space = UniqueSpace.from_packed(torch.randint(0, vocabulary, (int(bounds[-1]),), generator=g), bounds)
    decay = None
    options: dict[str, Any] = {"chunk": chunk}
    if kind != "none":
        decay = alibi_slopes(heads[0]).double() * (-0.1 if kind == "growing" else 1.0)
        decay.requires_grad_(kind != "alibi")
        if timed:
            steps = torch.rand(space.num_occurrences, generator=g, dtype=torch.float64) * 3
            options["times"] = 1e6 + steps.cumsum(0)
    compare(space, inputs_of(space, *heads, seed=seed), decay, through, **options)


def test_all_distinct_one_repeated_and_padded() -> None:
    for tokens in (torch.arange(40), torch.zeros(40, dtype=torch.int64)):
        space = UniqueSpace.from_packed(tokens)
        compare(space, inputs_of(space, 2, 1), None, "both", chunk=7)
    padded = UniqueSpace.from_padded(torch.randint(0, 5, (3, 11)), torch.tensor([11, 0, 6]))
    compare(padded, inputs_of(padded, 2, 1), None, "both", chunk=4)


def test_nothing_at_all() -> None:
    space = UniqueSpace.from_packed(torch.empty(0, dtype=torch.int64))
    inputs = inputs_of(space, 2, 1)
    out, lse = causal_attention(space, *inputs, return_lse=True)
    assert out.shape == (0, 2, 4) and lse.shape == (0, 2)
    out.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_chunks_built_once_serve_every_layer() -> None:
    space = UniqueSpace.from_packed(torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(1)))
    chunks = CausalChunks.of(space, 8)
    inputs = inputs_of(space, 2, 2)
    assert torch.equal(causal_attention(space, *inputs, chunk=chunks), causal_attention(space, *inputs, chunk=8))
    groups = chunks.groups(1 << 40, span=16)
    assert [(g.start, g.stop) for g in groups] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert all(chunks.index_of(g) is chunks.index_of(g) for g in groups)
    two = UniqueSpace.from_packed(torch.tensor([1, 1, 2, 3, 3]), torch.tensor([0, 3, 5]))
    whole, cut_up = (CausalChunks.of(two, size).before for size in (3, 2))
    assert (whole.rows_begun, whole.first_row, whole.visible.tolist()) == ([0, 2, 3], [0, 2], [0, 0])  # unread
    assert (cut_up.rows_begun, cut_up.first_row, cut_up.visible.tolist()) == ([0, 1, 2, 3], [0, 0, 2], [0, 1, 0])
    other = UniqueSpace.from_packed(torch.arange(50))
    with pytest.raises(ValueError, match="another space"):
        causal_attention(other, *inputs_of(other, 2, 2), chunk=chunks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    space = UniqueSpace.from_packed(torch.randint(0, 30, (300,), generator=torch.Generator().manual_seed(1)))
    inputs = inputs_of(space, 4, 2, dtype=dtype)
    decay = alibi_slopes(4).requires_grad_()
    out, lse = causal_attention(space, *inputs, decay=decay, chunk=32, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in (*inputs, decay)]
    expected = plain(space, wide[0], wide[1], wide[2], wide[3])
    atol = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected[0], rtol=atol, atol=atol)
    torch.testing.assert_close(lse.double(), expected[1], rtol=atol, atol=atol)
    grads = torch.autograd.grad(out.double().square().sum(), [*inputs, decay])
    for got, want in zip(grads, torch.autograd.grad(expected[0].square().sum(), wide), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=10 * atol, atol=10 * atol)


def test_gradients_of_a_frequent_token_sum_in_float32() -> None:
    space = UniqueSpace.from_packed(torch.zeros(4096, dtype=torch.int64))
    q, k, v = (torch.zeros(n, 1, 8, dtype=torch.bfloat16).requires_grad_() for n in (4096, 1, 1))
    out = causal_attention(space, q, k, v, chunk=2048)
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    assert grad.eq(4096).all()  # bf16 sums would stop at 256
    chunks = CausalChunks.of(space, 257)
    assert chunks.fold(torch.ones(257, 1, 1, dtype=torch.bfloat16), chunks.groups(1)[0]) == 257  # bf16 has 256 and 258


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_flatten(found)[0]:
            if isinstance(x, Tensor) and x.numel():
                # what it really holds: an expanded view holds less than it shows
                self.elements = max(self.elements, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return found


@pytest.mark.parametrize("decayed", [False, True])
def test_prefix_weights_never_outgrow_the_keys(decayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither L x U nor all chunks x U x H exist, forward or backward; the kernel is left out, its memory is its own affair."""
    import ta_plugin.attention.causal_parts as module

    length, vocabulary, heads, chunk = 4096, 512, 4, 4
    g = torch.Generator().manual_seed(0)
    space = UniqueSpace.from_packed(torch.randint(0, vocabulary, (length,), generator=g))
    q, k, v = (
        torch.randn(n, heads, 16, generator=g).requires_grad_() for n in (length, space.num_rows, space.num_rows)
    )
    weights: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, *_: Any, **options: Any) -> Any:
        if options.get("q_chunk") is not None:
            assert weight is not None
            weights.append(weight.numel() * weight.element_size())
        return q * k.sum() * v.sum(), q.sum(-1)

    monkeypatch.setattr(module, "weighted_attention", kernel)
    decay = alibi_slopes(heads).requires_grad_() if decayed else None
    chunks = CausalChunks.of(space, chunk)
    with LargestTensor() as largest:
        causal_attention(space, q, k, v, decay=decay, chunk=chunks).sum().backward()
    everything = length // chunk * space.num_rows * (heads if decayed else 1)
    allowed = k.numel() * k.element_size()
    whole = sum(weights) // 2  # forward makes as many as backward
    forward = [w for n, w in enumerate(weights) if sum(weights[:n]) < whole]
    backward = weights[len(forward) :]
    assert max(forward) <= allowed // (3 if decayed else 2)  # with what they are made from
    assert max(backward) <= allowed // (7 if decayed else 2)
    assert sum(weights) > 0.8 * everything * 4 * 2 * 0.9  # all of it was made, forward and backward, piece by piece
    # outputs are the largest, stacked in pairs where partials merge
    assert largest.elements <= 2 * q.numel()
    assert largest.elements < length * space.num_rows // 4
    if decayed:
        assert largest.elements < everything // 4


def test_weights_over_a_million_positions_in_float32() -> None:
    """The state carried over 10^6 positions stays as good as one formed in float64 at the end."""
    length, vocabulary, size = 1_000_000, 50, 8192
    g = torch.Generator().manual_seed(2)
    space = UniqueSpace.from_packed(torch.randint(0, vocabulary, (length,), generator=g))
    chunks = CausalChunks.of(space, size)
    rates = torch.tensor([0.5, 1e-3, 1e-6])
    state = PrefixDecay(chunks, torch.float32, Decay(rates, space.positions()), with_mean=True)
    counts = PrefixCounts(chunks, torch.float32)
    for group in chunks.groups(8 * vocabulary):
        last, derivative = state.weights(group)
        last_counts = counts.weights(group)
    assert derivative is not None
    begin = chunks.host_bounds[-2]
    age = space.positions()[:begin].double() - state.reference[-2]
    for head, rate in enumerate(rates.double()):
        terms = rate * age
        for row in (0, 17, 49):
            at = space.inverse[:begin] == row
            torch.testing.assert_close(last[-1, row, head].double(), terms[at].logsumexp(0), rtol=1e-6, atol=2e-5)
            mean = (terms[at].softmax(0) * age[at]).sum()
            torch.testing.assert_close(derivative[-1, row, head].double(), mean, rtol=1e-4, atol=1e-4)
            exact = at.sum().double().log()
            torch.testing.assert_close(last_counts[-1, row].double(), exact, rtol=1e-7, atol=1e-6)


def test_index_arithmetic_reaches_2_to_the_40() -> None:
    """Chunks of samples far beyond int32, and counts carried that far."""
    huge = 1 << 40
    samples, bounds = cut([0, huge, huge, huge + 1, 2 * huge], 1 << 38)
    assert samples == [0, 0, 0, 0, 2, 3, 3, 3, 3]
    assert [b - a for a, b in pairwise(bounds)] == [1 << 38] * 4 + [1] + [1 << 38] * 3 + [(1 << 38) - 1]

    space = UniqueSpace.from_packed(torch.tensor([3, 4, 3, 3, 5, 4]))
    chunks = CausalChunks.of(space, 2)
    counts = PrefixCounts(chunks, torch.float64)
    counts.before += torch.tensor([huge, 1, 0])
    found = torch.cat([counts.weights(group)[:, :2] for group in chunks.groups(3)])
    expected = torch.tensor([[huge, 1], [huge + 1, 2], [huge + 3, 2]], dtype=torch.float64).log()
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0.0)
    assert counts.before.tolist() == [huge + 3, 3, 1]

    times = space.positions() + huge  # only differences of times count, and they are taken in int64
    inputs = inputs_of(space, 2, 2)
    decay = torch.tensor([0.3, 0.01], dtype=torch.float64)
    shifted = causal_attention(space, *inputs, decay=decay, times=times, chunk=2)
    assert torch.equal(shifted, causal_attention(space, *inputs, decay=decay, chunk=2))


@settings(max_examples=25)
@given(
    documents,
    st.sampled_from([1, 3, 7, 50]),
    st.sampled_from([(2, 2), (4, 2)]),
    decays,
    st.sampled_from(["out", "lse", "both"]),
)
def test_parts_by_a_kernel_that_takes_out_and_lse(
    lengths: list[int], chunk: int, heads: Any, kind: str, through: str
) -> None:
    """The way of the Hopper kernel, with its functions written out in float64: no part is computed again in backward."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, 6, (int(bounds[-1]),), generator=torch.Generator().manual_seed(chunk))
    space = UniqueSpace.from_packed(tokens, bounds)
    decay = None
    if kind != "none":
        decay = (alibi_slopes(heads[0]).double() * (-0.1 if kind == "growing" else 1.0)).requires_grad_(kind != "alibi")
    parts = KernelParts(0.5, written_out_kernel, False)
    with patch("ta_plugin.attention.causal.parts_for", lambda *_: parts):
        compare(space, inputs_of(space, *heads), decay, through, chunk=chunk)


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_reaches_a_kernel(deterministic: bool) -> None:
    """Strided views are made what the kernel reads, q, k, v and dout alike; and backward is asked for as the caller says."""
    space = UniqueSpace.from_packed(torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(1)))
    seen: list[bool] = []

    class Kernels:
        @staticmethod
        def forward(*args: Any, **options: Any) -> Any:
            check(*args[:3])
            return written_out_kernel.forward(*args, **options)

        @staticmethod
        def backward(dout: Tensor, dlse: Any, *args: Any, **options: Any) -> Any:
            check(dout, *args[:3])
            assert not args[-2]  # nobody wants the gradient of weights that count
            seen.append(args[-1])
            return written_out_kernel.backward(dout, dlse, *args, **options)

    def check(*rows: Tensor) -> None:
        for x in rows:
            assert x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0

    wide = [torch.randn(n, 2, 17, dtype=torch.float64) for n in (60, space.num_rows, space.num_rows)]
    parts = KernelParts(8**-0.5, Kernels, deterministic)
    with patch("ta_plugin.attention.causal.parts_for", lambda *_: parts):
        for decay in (None, alibi_slopes(2).double()):  # a fixed one has no gradient either
            inputs = [x[..., 1:9].requires_grad_() for x in wide]
            compare(space, inputs, decay, "out", chunk=7, dout=torch.randn(60, 2, 9))
    assert seen and set(seen) == {deterministic}


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("chunk", [7, 100])
def test_the_argument_decides_whether_backward_repeats(
    chunk: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ta_plugin.attention.causal as whole
    import ta_plugin.attention.causal_parts as cut

    asked: list[bool] = []
    biases: list[float] = []

    def recorded(*args: Any, **options: Any) -> Any:
        asked.append(options["deterministic"])
        if options.get("causal") and args[3] is not None:
            biases.append(float(args[3].abs().max()))
        return weighted_attention(*args, **options)

    for module in (whole, cut):
        monkeypatch.setattr(module, "weighted_attention", recorded)
    space = UniqueSpace.from_packed(torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(1)))
    q, k, v = inputs_of(space, 2, 2)
    causal_attention(space, q, k, v, chunk=chunk, deterministic=deterministic).sum().backward()
    assert asked and set(asked) == {deterministic}
    asked.clear()
    causal_attention(space, q, k, v, chunk=chunk, decay=torch.ones(2))
    assert set(asked) == {True}  # as weighted_attention itself
    assert max(biases) <= (min(chunk, 60) + 1) / 2  # counted from the middle, where float32 is best used
    torch.use_deterministic_algorithms(True)
    try:
        assert parts_for(q, v, 1.0, None, False).deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert parts_for(q, v, 1.0, None, deterministic).deterministic == deterministic


def test_runs_repeat_to_the_bit() -> None:
    space = UniqueSpace.from_packed(torch.randint(0, 20, (200,), generator=torch.Generator().manual_seed(1)))
    results = []
    for _ in range(2):
        inputs = inputs_of(space, 4, 2, dtype=torch.float32)
        decay = alibi_slopes(4).requires_grad_()
        out = causal_attention(space, *inputs, decay=decay, chunk=16)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, decay])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_stays_in_its_document() -> None:
    space = UniqueSpace.from_packed(torch.tensor([1, 2, 1, 3, 1, 3, 3, 1]), torch.tensor([0, 4, 8]))
    q, k, v = inputs_of(space, 2, 2)
    with torch.no_grad():
        k[1] = torch.nan  # token 2 of the first document, at its second position
    out = causal_attention(space, q, k, v, chunk=2)
    assert not out[[0, 4, 5, 6, 7]].isnan().any()
    assert out[1:4].isnan().all()


def test_bad_input_is_named() -> None:
    space = UniqueSpace.from_packed(torch.tensor([1, 2, 1]))
    q, k, v = inputs_of(space, 2, 2)
    for call, message in (
        (lambda: causal_attention(q, q, k, v), "space is a Tensor; pass UniqueSpace"),
        (lambda: causal_attention(space, q[:2], k, v), "q has shape"),
        (lambda: causal_attention(space, q, k[:1], v), "k has shape"),
        (lambda: causal_attention(space, q, k, v, decay=torch.ones(3)), "decay"),
        (lambda: causal_attention(space, q, k, v, times=torch.ones(3)), "times are given without decay"),
        (lambda: causal_attention(space, q, k, v, decay=torch.ones(2), times=torch.ones(2)), "times have shape"),
        (lambda: causal_attention(space, q, k, v, chunk=0), "chunk is 0"),
        (lambda: CausalChunks.of(space.with_spare_rows(4), 2), "2 spare rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
