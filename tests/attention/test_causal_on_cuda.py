"""Causal attention in unique space on a GPU, bf16 and float32, against plain attention in float64. Runs where CUDA is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ta_plugin import UniqueSpace
from ta_plugin.attention import alibi_slopes, causal_attention
from ta_plugin.attention.causal_parts import KernelParts, parts_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def plain(space: UniqueSpace, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    keys, values = (x[space.inverse].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * q.shape[2] ** -0.5
    place, sample = torch.arange(q.shape[0], device=q.device), space.sample_of_occurrences()
    if decay is not None:
        scores = scores - decay[:, None, None] * (place[:, None] - place)
    scores = scores.masked_fill((place[:, None] < place) | (sample[:, None] != sample), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), values), scores.logsumexp(-1).T


def inputs_of(space: UniqueSpace, heads: tuple[int, int], dim: int, dtype: torch.dtype, apart: bool) -> list[Tensor]:
    """q, k, v as views with strides where they are not apart: of one projection's output, one element in."""
    g = torch.Generator("cuda").manual_seed(0)
    found = []
    for rows, count in ((space.num_occurrences, heads[0]), (space.num_rows, heads[1]), (space.num_rows, heads[1])):
        wide = torch.randn(rows, count, 2 * dim + 1, device="cuda", generator=g).to(dtype)
        x = wide[..., 1 : dim + 1]
        found.append((x.contiguous() if apart else x).requires_grad_())
    return found


def run(space: UniqueSpace, inputs: list[Tensor], decay: Tensor | None, **options: Any) -> list[Tensor]:
    leaves = [*inputs, decay] if decay is not None else inputs
    out, lse = causal_attention(space, *inputs, decay=decay, return_lse=True, **options)
    return [out.detach(), lse.detach(), *gradients(out, lse, leaves)]


def gradients(out: Tensor, lse: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(1)
    dout, dlse = (torch.randn(x.shape, device="cuda", generator=g).to(x.dtype) for x in (out.bfloat16(), lse.float()))
    return list(torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), dlse.to(lse.dtype))))


ONE = ([1500], (4, 2), 64, True)
SEVERAL = ([700, 0, 1, 513], (2, 2), 128, False)
# float32 runs on FlexAttention, which compiles for many seconds per kind of shape: each of its kinds once
CASES = [(*shape, chunk, torch.bfloat16) for shape in (ONE, SEVERAL) for chunk in (64, 200, 4096)] + [
    (*ONE, 64, torch.float32),
    (*SEVERAL, 4096, torch.float32),
]


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize(("lengths", "heads", "dim", "apart", "chunk", "dtype"), CASES, ids=str)
def test_equals_plain_causal_attention(
    lengths: list[int], heads: tuple[int, int], dim: int, apart: bool, chunk: int, decayed: bool, dtype: torch.dtype
) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).cuda()
    g = torch.Generator("cuda").manual_seed(2)
    tokens = (
        torch.randint(0, 300, (int(bounds[-1]),), device="cuda", generator=g) ** 2 // 300
    )  # some frequent, some rare
    space = UniqueSpace.from_packed(tokens, bounds)
    decay = (alibi_slopes(heads[0]) * 0.05).cuda().requires_grad_() if decayed else None
    inputs = inputs_of(space, heads, dim, dtype, apart)
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() == (9, 0):
        assert isinstance(parts_for(inputs[0], inputs[2], 1.0, None, True), KernelParts)
    got = run(space, inputs, decay, chunk=chunk)
    again = run(space, inputs, decay, chunk=chunk)
    fast = run(space, inputs, decay, chunk=chunk, deterministic=False)
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    rate = None if decay is None else decay.detach().double().requires_grad_()
    out, lse = plain(space, *leaves, rate)
    want = [out, lse, *gradients(out, lse, leaves if rate is None else [*leaves, rate])]
    for n, (ours, same, other, exact) in enumerate(zip(got, again, fast, want, strict=True)):
        assert torch.equal(ours, same), n
        for x in (ours, other):
            error = float((x.double() - exact).norm() / exact.norm())
            assert error < (1e-2 if n < 5 else 6e-2), (n, error)  # d(decay) nearly cancels
