"""The sm_90a kernel against float64: causal, chunks of queries with a prefix of keys each, no weights, moving maxima."""

import pytest
import torch
from weighted_attention_harness import NAMES, check, kernel, make_inputs, offsets, relative, run
from weighted_attention_reference import reference_gradients

BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS = [1, 64, 0, 129, 300, 7, 191, 192, 193, 700]
# three samples' chunks: their queries, and how many of the sample's keys each sees
CHUNKS = [[100, 64, 0, 300], [], [1, 257, 128]]
CHUNK_KEYS = [400, 50, 300]
VISIBLE = [0, 65, 400, 399, 129, 128, 1000]
CU_CHUNKS = offsets([len(chunks) for chunks in CHUNKS])
CHUNK_LENGTHS = [n for chunks in CHUNKS for n in chunks]


@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
@pytest.mark.parametrize("weights", [None, (), (4,)], ids=["none", "shared", "per_head"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_causal(dim, weights, deterministic):
    q, k, v, w, dout, dlse = make_inputs(LENGTHS, LENGTHS, 4, 2, dim, BF16, weights or (), absent=0.1, seed=dim)
    if weights is None:
        w = None
    arguments = (q, k, v, w, LENGTHS, LENGTHS, dim**-0.5, dout, dlse)
    check(run(*arguments, deterministic, causal=True), reference_gradients(*arguments, causal=True), BF16)


def test_causal_heads_in_groups():
    """So many keys that the heads' tiles are listed head by head: each sample's results are those it has alone."""
    lengths = [700] * 100
    q, k, v, w, _, _ = make_inputs(lengths, lengths, 6, 3, 64, BF16, (), absent=0.1)
    assert 2 * k.shape[0] * 64 * 4 > 32 << 20  # the keys and values of two heads: heads_together in forward.cu
    together = kernel.forward(q, k, v, w, offsets(lengths), offsets(lengths), 0.125, causal=True)
    for sample in (0, 57, 99):
        own = slice(700 * sample, 700 * (sample + 1))
        alone = kernel.forward(q[own], k[own], v[own], w[own], offsets([700]), offsets([700]), 0.125, causal=True)
        assert all(torch.equal(a[own], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
@pytest.mark.parametrize("weights", ["none", "shared", "per_head"])
@pytest.mark.parametrize("visible", [True, False], ids=["prefix", "all"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_chunks(dim, visible, weights, deterministic):
    def shape(keys):
        return (len(CHUNK_LENGTHS), keys, 4) if weights == "per_head" else (len(CHUNK_LENGTHS), keys)

    q, k, v, w, dout, dlse = make_inputs(CHUNK_LENGTHS, CHUNK_KEYS, 4, 2, dim, BF16, shape, absent=0.2, seed=dim)
    masks = {"cu_chunks": CU_CHUNKS}
    if visible:
        masks["k_visible"] = torch.tensor(VISIBLE, dtype=torch.int32, device="cuda")
    arguments = (q, k, v, None if weights == "none" else w, CHUNK_LENGTHS, CHUNK_KEYS, dim**-0.5, dout, dlse)
    check(run(*arguments, deterministic, **masks), reference_gradients(*arguments, **masks), BF16)


@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
def test_nan_beyond_what_chunks_see(deterministic):
    """Keys beyond every prefix, or absent for every chunk, may hold NaN; so may the sample between."""
    dim, seen = 64, torch.tensor([30, 65, 300, 399, 129, 128, 200], dtype=torch.int32, device="cuda")
    q, k, v, w, dout, dlse = make_inputs(CHUNK_LENGTHS, CHUNK_KEYS, 4, 2, dim, BF16, lambda n: (7, n), absent=0.2)
    w[:, 7] = -torch.inf
    masks = {"cu_chunks": CU_CHUNKS, "k_visible": seen}
    arguments = (w, CHUNK_LENGTHS, CHUNK_KEYS, dim**-0.5, dout, dlse)
    clean = run(q, k, v, *arguments, True, **masks)
    rows = torch.zeros(len(k), dtype=torch.bool, device="cuda")
    rows[[7, 399]] = True
    rows[400:450] = True
    rows[650:] = True
    k[rows], v[rows] = torch.nan, torch.nan
    for name, got, want in zip(NAMES, run(q, k, v, *arguments, deterministic, **masks), clean, strict=True):
        if deterministic:
            assert torch.equal(got, want), name
        else:
            assert relative(got, want) < 1e-3, name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_without_weights(dim, dtype):
    q, k, v, _, dout, dlse = make_inputs(LENGTHS, LENGTHS, 2, 2, dim, dtype, ())
    arguments = (q, k, v, None, LENGTHS, LENGTHS, dim**-0.5, dout, dlse)
    expected = reference_gradients(*arguments)
    for deterministic in (True, False):
        check(run(*arguments, deterministic), expected, dtype)


@pytest.mark.parametrize("step", [2.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_maxima_that_move(dim, dtype, direction, step):
    """Weights that rise by `step` from one tile of 128 keys to the next: the base must follow without losing a key."""
    lengths = [900, 130, 600]
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, 2, 1, dim, dtype, ())
    position = torch.cat([torch.arange(n, device="cuda") for n in lengths])
    w = direction * step * (position // 128) + w
    w[(position < 200) & (torch.arange(len(w), device="cuda") > 1000)] = -torch.inf  # a first tile without keys
    arguments = (q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse)
    # float32 holds scores of hundreds to 1e-5: compare with what that leaves
    results, expected = run(*arguments, True), reference_gradients(*arguments)
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, results, expected, strict=True)}
    assert max(errors.values()) < (8e-3 if dtype is BF16 else 2e-3), errors


def test_refusals():
    q, k, v, w, _, _ = make_inputs([5, 3], [5, 3], 2, 2, 64, BF16, ())
    cu = offsets([5, 3])
    one = offsets([8])
    for match, arguments, masks in [
        ("without cu_chunks", (q, k, v, w, cu, one, 0.1), {}),
        ("exclude each other", (q, k, v, None, cu, one, 0.1), {"causal": True, "cu_chunks": offsets([2])}),
        ("k_visible needs cu_chunks", (q, k, v, w, cu, cu, 0.1), {"k_visible": offsets([1])}),
        ("log_weight must be", (q, k, v, w, cu, one, 0.1), {"cu_chunks": offsets([2])}),
        ("head_dim must be", (q[..., :32], k[..., :32], v[..., :32], w, cu, cu, 0.1), {}),
    ]:
        with pytest.raises(ValueError, match=match):
            kernel.forward(*arguments, **masks)
