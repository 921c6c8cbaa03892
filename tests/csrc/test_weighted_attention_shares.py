"""Backward with its last round of key tiles shared out among all multiprocessors (head_dim 96 and 128): few keys under
many queries."""

import pytest
import torch
from weighted_attention_harness import NAMES, check, make_inputs, offsets, relative, run
from weighted_attention_reference import reference_gradients

BF16, FP16 = torch.bfloat16, torch.float16
# one sample of as many parts as there may be, one of shorter parts, one whose parts are mostly empty
QUERIES, KEYS = [5000, 1300, 10], [300, 129, 200]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("weights", [None, (), (4,)], ids=["none", "shared", "per_head"])
@pytest.mark.parametrize("dim", [96, 128])
def test_few_keys(dim, weights, dtype):
    q, k, v, w, dout, dlse = make_inputs(QUERIES, KEYS, 4, 2, dim, dtype, weights or (), absent=0.1, seed=dim)
    arguments = (q, k, v, None if weights is None else w, QUERIES, KEYS, dim**-0.5, dout, dlse)
    check(run(*arguments, False), reference_gradients(*arguments), dtype)


@pytest.mark.parametrize("dim", [96, 128])
def test_whole_rounds_before(dim):
    lengths, heads = [2048], 17  # 272 tiles: two rounds of 132 and 8 tiles, or of 114 and 44
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, heads, heads, dim, BF16, (heads,), seed=dim)
    arguments = (q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse)
    check(run(*arguments, False), reference_gradients(*arguments), BF16)


@pytest.mark.parametrize("visible", [True, False], ids=["prefix", "all"])
def test_chunks(visible):
    queries, keys, dim = [2000, 64, 0, 700, 1, 1500], [400, 50, 300], 128
    masks = {"cu_chunks": offsets([3, 0, 3])}
    q, k, v, w, dout, dlse = make_inputs(queries, keys, 4, 2, dim, BF16, lambda n: (6, n), absent=0.2)
    if visible:
        masks["k_visible"] = torch.tensor([400, 65, 10, 129, 0, 200], dtype=torch.int32, device="cuda")
    arguments = (q, k, v, w, queries, keys, dim**-0.5, dout, dlse)
    check(run(*arguments, False, **masks), reference_gradients(*arguments, **masks), BF16)


@pytest.mark.parametrize("dim", [96, 128])
def test_keys_repeat_to_the_bit_and_nan_stays_absent(dim):
    """The parts are added in their order; absent keys may hold NaN."""
    q, k, v, w, dout, dlse = make_inputs(QUERIES, KEYS, 4, 2, dim, BF16, (), absent=0.1)
    arguments = (w, QUERIES, KEYS, dim**-0.5, dout, dlse)
    clean = run(q, k, v, *arguments, True)
    k[w == -torch.inf], v[w == -torch.inf] = torch.nan, torch.nan
    first = run(q, k, v, *arguments, False)
    for name, got, want in zip(NAMES, first, clean, strict=True):
        assert relative(got, want) < 1e-3, name
    for _ in range(10):
        again = run(q, k, v, *arguments, False)
        assert torch.equal(again[3], first[3]) and torch.equal(again[4], first[4])
