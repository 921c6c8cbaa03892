"""Relative error against float64: at most 1.5 times flash-attn-4's own on the same inputs, where that is installed."""

import pytest
import torch
from weighted_attention_harness import make_inputs, offsets, relative, run
from weighted_attention_reference import reference_gradients

flash = pytest.importorskip("flash_attn.cute", reason="needs flash-attn-4 to compare with")

LENGTHS = [2048, 500, 1024]


def flash_gradients(q, k, v, dout, scale, causal):
    cu = offsets(LENGTHS)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    most = max(LENGTHS)
    out = flash.flash_attn_varlen_func(
        *leaves,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=most,
        max_seqlen_k=most,
        softmax_scale=scale,
        causal=causal,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sharpness", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_error_against_flash_attention(dim, sharpness, causal):
    q, k, v, _, dout, _ = make_inputs(LENGTHS, LENGTHS, 4, 4, dim, torch.bfloat16, (), seed=dim)
    q, scale = q * sharpness, dim**-0.5
    dlse = torch.zeros(q.shape[:2], device="cuda")
    arguments = (q, k, v, None, LENGTHS, LENGTHS, scale, dout, dlse)
    out, _, *gradients, _ = reference_gradients(*arguments, causal=causal)
    expected = (out, *gradients)
    peer = [relative(a, b) for a, b in zip(flash_gradients(q, k, v, dout, scale, causal), expected, strict=True)]
    for deterministic in (False, True):
        result, _, *rest = run(*arguments, deterministic, causal=causal)
        errors = [relative(a, b) for a, b in zip((result, *rest), expected, strict=True)]
        ratios = {name: f"{a / b:.2f}" for name, a, b in zip(("out", "dq", "dk", "dv"), errors, peer, strict=True)}
        print(ratios)
        assert all(a <= 1.5 * b for a, b in zip(errors, peer, strict=True)), ratios
