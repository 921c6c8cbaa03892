"""Weighted attention on one Hopper GPU against kernels with and without weights, in one run.

    python examples/benchmarks/weighted_attention.py [--dims 64 128] [--cases "4k x 4" ragged] [--peers cudnn flash4]

TFLOP/s count 4 * queries * keys * heads * head_dim forward and 2.5 times that backward, summed over samples. `ours` has
log weights drawn from [0, log 1e7], `repeatable` the backward that repeats bit for bit, `unweighted` none of them; cuDNN (through
torch) and `flash4` have none; `flash4_weighted` and `flex` have them as a score_mod. The last columns are the ratios to flash-attn-4
without weights. A peer that is not installed, or fails, says so. All kernels of a case take turns, round after round, so that
they share the GPU's clocks and temperature; times are medians over CUDA events, inputs rotate between two sets.

Then accuracy: relative errors (Frobenius) against float64 of ours and of flash-attn-4 with the same weights on the same inputs,
and of both without weights, with the ratio.
"""

import argparse
import math
import re
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import Table, conditions
from torch.nn.attention import SDPBackend, sdpa_kernel

from ta_plugin.attention import weighted_attention
from ta_plugin.attention.backends.hopper import extension

HEADS = 16
PEERS = ["repeatable", "unweighted", "cudnn", "flex", "flash4", "flash4_repeatable", "flash4_weighted"]


def ragged_lengths(total=32768):
    """Distinct tokens per document of real text: the Python standard library's sources, in file order."""
    lengths = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        distinct = len(set(re.findall(r"\w+|[^\w\s]|\s+", path.read_text(errors="ignore"))))
        if 10 <= distinct <= 20000 and sum(lengths) + distinct <= total:
            lengths.append(distinct)
    return lengths


def medians_ms(functions, rounds):
    """functions: {name: the same work on different inputs}; one call each in turn, per round."""
    times = {name: [] for name in functions}
    for works in functions.values():
        for work in works:
            work()
    for i in range(rounds):
        for name, works in functions.items():
            torch.cuda.synchronize()
            time.sleep(0.002)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            works[i % len(works)]()  # fills the launch queue, so that the host's work is not timed
            begin.record()
            works[(i + 1) % len(works)]()
            end.record()
            times[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in times.items()}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def draw(lengths, dim):
    total = sum(lengths)
    q, k, v, dout = (torch.randn(total, HEADS, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q, k, v, dout, torch.rand(total, device="cuda") * math.log(1e7)


def ours(lengths, dim, sets, deterministic=False, weighted=True):
    """The kernel itself, as its autograd function calls it."""
    cu = bounds(lengths)
    scale = dim**-0.5
    loaded = extension()
    if loaded.kernels is None:
        raise RuntimeError(loaded.reason)
    forwards, backwards = [], []
    for q, k, v, dout, w in sets:
        w = w if weighted else None
        out, lse = loaded.kernels.forward(q, k, v, w, cu, cu, scale)
        forwards.append(lambda q=q, k=k, v=v, w=w: loaded.kernels.forward(q, k, v, w, cu, cu, scale))
        arguments = (dout, None, q, k, v, w, out, lse, cu, cu, scale, False, deterministic)
        backwards.append(lambda a=arguments: loaded.kernels.backward(*a))
    return forwards, backwards


def repeatable(lengths, dim, sets):
    return ours(lengths, dim, sets, deterministic=True)


def unweighted(lengths, dim, sets):
    return ours(lengths, dim, sets, weighted=False)


def through_autograd(attention, sets):
    forwards, backwards = [], []
    for q, k, v, dout, w in sets:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attention(q, k, v, w)
        forwards.append(lambda q=q, k=k, v=v, w=w: attention(q.detach(), k.detach(), v.detach(), w))
        backwards.append(
            lambda o=out, leaves=(q, k, v), g=dout: torch.autograd.grad(o, leaves, g.view_as(o), retain_graph=True)
        )
    return forwards, backwards


def batched(lengths, attention):
    """(tokens, heads, dim) as (batch, heads, length, dim): for samples of equal length only."""
    if len(set(lengths)) > 1:
        raise ValueError("equal lengths only")

    def run(q, k, v, w):
        q, k, v = (x.view(len(lengths), lengths[0], HEADS, -1).transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, w.view(len(lengths), -1)).transpose(1, 2).reshape(-1, HEADS, q.shape[-1])

    return run


def cudnn(lengths, dim, sets):
    def attention(q, k, v, w):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return through_autograd(batched(lengths, attention), sets)


def flex(lengths, dim, sets):
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q, k, v, w):
        return compiled(q, k, v, score_mod=lambda score, b, h, i, j: score + w[b, j])

    return through_autograd(batched(lengths, attention), sets)


def flash4(lengths, dim, sets, deterministic=False, weighted=False):
    from flash_attn.cute import flash_attn_varlen_func

    cu, options = bounds(lengths), {}
    if weighted:
        from ta_plugin.attention.backends.flash4 import weight_modifiers

        options = dict(zip(("score_mod", "score_mod_bwd"), weight_modifiers(), strict=True))

    def attention(q, k, v, w):
        extra = {**options, "aux_tensors": [w]} if weighted else {}
        longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **longest, deterministic=deterministic, **extra
        )
        return out[0] if isinstance(out, tuple) else out

    return through_autograd(attention, sets)


def flash4_repeatable(lengths, dim, sets):
    return flash4(lengths, dim, sets, deterministic=True)


def flash4_weighted(lengths, dim, sets):
    return flash4(lengths, dim, sets, weighted=True)


def errors(backend, inputs, dtype, cu, weighted, exact=None):
    """Results of a backend, or their relative errors against `exact`."""
    q, k, v, dout, w = inputs
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    weight = w.to(torch.promote_types(dtype, torch.float32)) if weighted else None
    out, lse = weighted_attention(*leaves, weight, cu, cu, return_lse=True, backend=backend, deterministic=False)
    results = [out, lse, *torch.autograd.grad(out, leaves, dout.to(dtype))]
    if exact is None:
        return [x.detach() for x in results]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True)]


def accuracy(dims):
    table = Table(["relative error against float64", "d", "out", "lse", "dq", "dk", "dv"])
    lengths = [1500, 700, 129, 64, 1000]
    cu = bounds(lengths)
    for dim in dims:
        inputs = [x[:, :4] if x.dim() == 3 else x for x in draw(lengths, dim)]
        for weighted in (True, False):
            kind = "with weights" if weighted else "without weights"
            exact = errors("reference", inputs, torch.float64, cu, weighted)
            mine = errors("hopper", inputs, torch.bfloat16, cu, weighted, exact)
            table.row(f"ours {kind}", dim, *[f"{e:.2e}" for e in mine])
            try:
                theirs = errors("flash4", inputs, torch.bfloat16, cu, weighted, exact)
            except Exception as error:
                table.row(f"flash4 {kind}", dim, reason(error), *[""] * 4)
                continue
            table.row(f"flash4 {kind}", dim, *[f"{e:.2e}" for e in theirs])
            table.row("ours / flash4", dim, *[f"{a / b:.2f}" for a, b in zip(mine, theirs, strict=True)])


def reason(error):
    return f"{type(error).__name__}: {str(error)[:60]}".replace("\n", " ")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", nargs="*", default=["1k x 16", "4k x 4", "16k x 1", "ragged"])
    options = parser.parse_args()
    cases = {"1k x 16": [1024] * 16, "4k x 4": [4096] * 4, "16k x 1": [16384], "ragged": ragged_lengths()}
    packages = ("triton", "flash-attn-4", "nvidia-cutlass-dsl")
    lengths = cases["ragged"]
    ragged = f"ragged: {len(lengths)} samples of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens"
    print(conditions(torch.device("cuda"), f"bf16, {HEADS} heads", ragged, packages=packages))
    columns = ["case", "d", "kernel", "forward TFLOP/s", "backward TFLOP/s", "forward ms", "backward ms"]
    table = Table([*columns, "forward / flash4", "backward / flash4"])
    for dim in options.dims:
        for case in options.cases:
            compare(case, cases[case], dim, options, table)
    accuracy(options.dims)


def compare(case, lengths, dim, options, table):
    """One case's rows."""
    sets = [draw(lengths, dim) for _ in range(2)]
    flop = sum(4 * n * n * HEADS * dim for n in lengths)
    names = ["ours", *options.peers]
    works, missing = {}, {}
    for name in names:
        try:
            works[name] = globals()[name](lengths, dim, sets)
            for work in (works[name][0][0], works[name][1][0]):
                work()
        except Exception as error:  # a peer that cannot run is a row, not an end
            works.pop(name, None)
            missing[name] = reason(error)
    forward = medians_ms({name: pair[0] for name, pair in works.items()}, options.rounds)
    backward = medians_ms({name: pair[1] for name, pair in works.items()}, options.rounds)
    for name in names:
        if name in missing:
            table.row(case, dim, name, missing[name], *[""] * 5)
            continue
        f, b = forward[name], backward[name]
        ratios = [f"{forward['flash4'] / f:.2f}", f"{backward['flash4'] / b:.2f}"] if "flash4" in forward else ["", ""]
        rates = [f"{flop / f / 1e9:.0f}", f"{2.5 * flop / b / 1e9:.0f}"]
        table.row(case, dim, name, *rates, f"{f:.3f}", f"{b:.3f}", *ratios)
    torch._dynamo.reset()


if __name__ == "__main__":
    main()
