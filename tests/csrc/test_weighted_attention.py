"""The sm_90a kernel against float64: ragged packs, weights, absent keys, NaN in foreign rows, repeatability."""

import pytest
import torch
from weighted_attention_harness import NAMES, check, make_inputs, relative, run
from weighted_attention_reference import reference_gradients

RAGGED_Q = [1, 64, 0, 129, 300, 7, 65, 0, 63, 200]
RAGGED_K = [5, 176, 10, 300, 1, 0, 177, 0, 129, 511]


@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("heads, heads_kv", [(2, 2), (4, 2)])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_ragged(dtype, dim, heads, heads_kv, per_head, deterministic):
    inputs = make_inputs(
        RAGGED_Q, RAGGED_K, heads, heads_kv, dim, dtype, (heads,) if per_head else (), absent=0.1, seed=dim + heads
    )
    q, k, v, w, dout, dlse = inputs
    scale = dim**-0.5
    results = run(q, k, v, w, RAGGED_Q, RAGGED_K, scale, dout, dlse, deterministic)
    check(results, reference_gradients(q, k, v, w, RAGGED_Q, RAGGED_K, scale, dout, dlse), dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
def test_long(dim, deterministic):
    lengths = [1500, 3000]
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, 2, 1, dim, torch.bfloat16, (), absent=0.01)
    q = q * 3  # peaked rows: maxima that move
    results = run(q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse, deterministic)
    check(results, reference_gradients(q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse), torch.bfloat16)


@pytest.mark.parametrize("deterministic", [True, False], ids=["repeatable", "atomic"])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_nan_stays_at_home(dim, per_head, deterministic):
    q, k, v, w, dout, dlse = make_inputs(RAGGED_Q, RAGGED_K, 4, 2, dim, torch.bfloat16, (4,) if per_head else ())
    absent = torch.rand(len(k), device="cuda") < 0.1
    w[absent] = -torch.inf
    if per_head:
        w[::7, 1] = -torch.inf  # absent for one head of a group only: no NaN there
    clean = run(q, k, v, w, RAGGED_Q, RAGGED_K, dim**-0.5, dout, dlse, True)
    k[absent], v[absent] = torch.nan, torch.nan
    # samples 3 and 8 are NaN throughout; their neighbours share tiles of memory with them
    rows_q, rows_k = [], []
    for sample in range(len(RAGGED_Q)):
        poisoned = sample in (3, 8)
        rows_q += [poisoned] * RAGGED_Q[sample]
        rows_k += [poisoned] * RAGGED_K[sample]
    rows_q, rows_k = torch.tensor(rows_q).cuda(), torch.tensor(rows_k).cuda()
    for x, rows in ((q, rows_q), (dout, rows_q), (k, rows_k), (v, rows_k)):
        x[rows] = torch.nan
    results = run(q, k, v, w, RAGGED_Q, RAGGED_K, dim**-0.5, dout, dlse, deterministic)
    for name, got, want in zip(NAMES, results, clean, strict=False):
        keep = ~(rows_q if name in ("out", "lse", "dq") else rows_k)
        if deterministic:
            assert torch.equal(got[keep], want[keep]), name
        else:
            assert relative(got[keep], want[keep]) < 1e-3, name


def test_strided_rows():
    lengths = [100, 30]
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, 4, 4, 64, torch.bfloat16, ())
    packed = torch.stack([q, k, v], 1)  # (tokens, 3, heads, head_dim), as a fused projection leaves them
    results = run(*packed.unbind(1), w, lengths, lengths, 0.125, dout, dlse, True)
    for got, want in zip(results, run(q, k, v, w, lengths, lengths, 0.125, dout, dlse, True), strict=False):
        assert torch.equal(got, want)


@pytest.mark.parametrize("lengths_q, lengths_k", [([], []), ([0, 0], [0, 0]), ([5, 3], [0, 0]), ([0, 0], [5, 3])])
def test_empty(lengths_q, lengths_k):
    q, k, v, w, dout, dlse = make_inputs(lengths_q, lengths_k, 2, 2, 64, torch.bfloat16, ())
    for deterministic in (True, False):
        out, lse, *gradients = run(q, k, v, w, lengths_q, lengths_k, 0.125, dout, dlse, deterministic)
        assert (out == 0).all() and (lse == -torch.inf).all()
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dim", [64, 128])
def test_repeats_to_the_bit(dim):
    lengths = [700, 10, 0, 1300, 64]
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, 8, 4, dim, torch.bfloat16, (8,), absent=0.05)
    first = run(q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse, True)
    for _ in range(50):
        again = run(q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))


@pytest.mark.parametrize("masks", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("dim", [64, 128])
def test_turns(dim, masks):
    """A head with more tiles of keys than a GPU has multiprocessors: they add to dq one after the other."""
    lengths = [20000, 300]
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, 3, 3, dim, torch.bfloat16, ())
    arguments = (q, k, v, w, lengths, lengths, dim**-0.5, dout, dlse)
    first = run(*arguments, True, **masks)
    for name, got, want in zip(NAMES, first, run(*arguments, False, **masks), strict=True):
        assert relative(got, want) < 1e-3, name
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments, True, **masks), strict=True))
