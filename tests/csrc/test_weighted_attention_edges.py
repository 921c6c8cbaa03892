"""Samples that end a little before, at and after the edges of tiles and of their halves: more tiles than multiprocessors."""

import pytest
import torch
from weighted_attention_harness import NAMES, check, kernel, make_inputs, offsets, relative, run
from weighted_attention_reference import reference_gradients

BF16 = torch.bfloat16
LENGTHS = [n + d for n in (64, 128, 192, 256, 320) for d in (-1, 0, 1)] + [1, 0, 40, 700]
OTHERS = [200, 1, 0, 65, 128, 129, 10, 300, 63, 64, 500, 127, 30, 256, 1, 7, 100, 90, 1]


@pytest.mark.parametrize("masks", [{}, {"causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("heads, heads_kv", [(13, 13), (20, 10)])
@pytest.mark.parametrize("weights", [None, "shared", "per_head"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_edges(dim, dtype, deterministic, weights, heads, heads_kv, masks):
    assert heads_kv * sum((n + 127) // 128 for n in LENGTHS) > 2 * 132
    shape = (heads,) if weights == "per_head" else ()
    q, k, v, w, dout, dlse = make_inputs(LENGTHS, LENGTHS, heads, heads_kv, dim, dtype, shape, absent=0.1, seed=dim)
    arguments = (q, k, v, None if weights is None else w, LENGTHS, LENGTHS, dim**-0.5, dout, dlse)
    expected = reference_gradients(*arguments, **masks)
    results = run(*arguments, deterministic, **masks)
    check(results, expected, dtype)
    if weights is not None:  # the kernel without the weights' gradients is another
        cu = offsets(LENGTHS), offsets(LENGTHS)
        bare = kernel.backward(dout, dlse, q, k, v, w, *results[:2], *cu, dim**-0.5, False, deterministic, **masks)
        check((*results[:2], *bare[:3]), expected[:5], dtype)


@pytest.mark.parametrize("dim", [64, 128])
def test_other_queries(dim):
    """Tiles without a query, and with one."""
    q, k, v, _, dout, dlse = make_inputs(OTHERS, LENGTHS, 12, 12, dim, BF16, ())
    arguments = (q, k, v, None, OTHERS, LENGTHS, dim**-0.5, dout, dlse)
    check(run(*arguments, False), reference_gradients(*arguments), BF16)


@pytest.mark.parametrize("dim", [64, 128])
def test_chunks(dim):
    """Two chunks of queries a sample; of the second's keys some tiles see nothing."""
    chunks, seen = [], []
    for i, n in enumerate(LENGTHS):
        chunks += [OTHERS[i], 70]
        seen += [n, (n * i) // len(LENGTHS)]
    masks = {"cu_chunks": offsets([2] * len(LENGTHS)), "k_visible": torch.tensor(seen, dtype=torch.int32).cuda()}
    q, k, v, w, dout, dlse = make_inputs(chunks, LENGTHS, 12, 12, dim, BF16, lambda n: (len(chunks), n), absent=0.2)
    arguments = (q, k, v, w, chunks, LENGTHS, dim**-0.5, dout, dlse)
    check(run(*arguments, False, **masks), reference_gradients(*arguments, **masks), BF16)


@pytest.mark.parametrize("weights_gradient", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_nan_stays_at_home(dim, weights_gradient):
    """A sample of NaN, and NaN in absent keys: nothing of them comes to others."""
    lengths, heads = [*LENGTHS, 40, 400, 330], 12
    q, k, v, w, dout, dlse = make_inputs(lengths, lengths, heads, heads, dim, BF16, (), absent=0.1)
    cu, scale = (offsets(lengths), offsets(lengths)), dim**-0.5

    def backward(deterministic):
        out, lse = kernel.forward(q, k, v, w, *cu, scale)
        return kernel.backward(dout, dlse, q, k, v, w, out, lse, *cu, scale, weights_gradient, deterministic)

    clean = backward(True)
    first = sum(LENGTHS) + 40  # behind a sample that does not fill one step
    for x in (q, k, v, dout):
        x[first : first + 400] = torch.nan
    k[w == -torch.inf], v[w == -torch.inf] = torch.nan, torch.nan
    for _ in range(3):
        for name, got, want in zip(NAMES[2:], backward(False)[: 4 if weights_gradient else 3], clean, strict=False):
            got, want = (torch.cat([x[:first], x[first + 400 :]]) for x in (got, want))
            assert relative(got, want) < 1e-3, name
