"""What the GPU tests of the weighted attention kernel share: the extension, inputs, and the comparison with float64.

Needs a Hopper GPU; takes the extension as the package does: built ahead of time, or now (about two minutes).
"""

import math

import pytest
import torch

from ta_plugin.ops.builder import load_extension

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
loaded = load_extension("ta_weighted_attention")
if loaded.kernels is None:
    raise RuntimeError(loaded.reason)
kernel = loaded.kernels

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.2e-3}
NAMES = ("out", "lse", "dq", "dk", "dv", "dlog_weight")


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def make_inputs(lengths_q, lengths_k, heads, heads_kv, dim, dtype, weight_shape, absent=0.0, seed=0):
    """q, k, v, log_weight, dout, dlse; weight_shape: (), (heads,), and before it (chunks,) where there are any."""
    g = torch.Generator("cuda").manual_seed(seed)

    def draw(tokens, h):
        return torch.randn(tokens, h, dim, generator=g, device="cuda").to(dtype)

    tq, tk = sum(lengths_q), sum(lengths_k)
    q, k, v, dout = draw(tq, heads), draw(tk, heads_kv), draw(tk, heads_kv), draw(tq, heads)
    shape = weight_shape(tk) if callable(weight_shape) else (tk, *weight_shape)
    log_weight = torch.rand(shape, generator=g, device="cuda") * math.log(1e7)
    log_weight[torch.rand(shape, generator=g, device="cuda") < absent] = -torch.inf
    dlse = torch.randn(tq, heads, generator=g, device="cuda")
    return q, k, v, log_weight, dout, dlse


def run(q, k, v, log_weight, lengths_q, lengths_k, scale, dout, dlse, deterministic, **masks):
    """out, lse, dq, dk, dv and, with weights, dlog_weight; masks: causal, cu_chunks, k_visible."""
    # what the allocator hands out next holds NaN: an element that is not written shows
    poison = [torch.full_like(x, torch.nan) for x in (q, q, k, v, q, k, v)]
    poison += [torch.full((64 << 20,), torch.nan, device="cuda")]
    del poison
    cu = offsets(lengths_q), offsets(lengths_k)
    out, lse = kernel.forward(q, k, v, log_weight, *cu, scale, **masks)
    wanted = log_weight is not None
    gradients = kernel.backward(dout, dlse, q, k, v, log_weight, out, lse, *cu, scale, wanted, deterministic, **masks)
    torch.cuda.synchronize()
    return (out, lse, *gradients)[: 6 if wanted else 5]


def relative(got, want):
    """Norm of the difference over the norm; -inf must be in the same places."""
    got, want = got.double(), want.double()
    infinite = want == -torch.inf
    assert torch.equal(got == -torch.inf, infinite)
    got, want = got.where(~infinite, 0), want.where(~infinite, 0)
    assert torch.isfinite(got).all()
    norm = want.norm()
    return ((got - want).norm() / norm).item() if norm > 0 else got.norm().item()


def check(results, expected, dtype):
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, results, expected, strict=False)}
    print({name: f"{error:.2e}" for name, error in errors.items()})
    assert errors.pop("lse") < 2e-4
    assert max(errors.values()) < TOLERANCE[dtype], errors
