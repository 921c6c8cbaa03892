"""Weighted attention on one Hopper GPU against kernels without weights, in one run.

    python examples/benchmarks/weighted_attention.py [--dims 64 128] [--peers repeatable cudnn flex flash4]

TFLOP/s count 4 * queries * keys * heads * head_dim forward and 2.5 times that backward, summed over samples. `ours` has
log weights drawn from [0, log 1e7]; cuDNN (through torch) and flash-attn-4 have none; FlexAttention has them as a
score_mod. A peer that is not installed, or fails, says so. All kernels of a case take turns, round after round, so that
they share the GPU's clocks and temperature; times are medians over CUDA events, inputs rotate between two sets.
"""

import argparse
import functools
import importlib
import math
import re
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 16


@functools.cache
def load_kernel():
    """The extension from the path, or built from csrc/ (about a minute)."""
    try:
        return importlib.import_module("ta_weighted_attention")
    except ModuleNotFoundError:
        from torch.utils.cpp_extension import load

        sources = Path(__file__).parents[2] / "csrc" / "weighted_attention"
        return load(
            "ta_weighted_attention",
            [str(sources / name) for name in ("binding.cpp", "forward.cu", "backward.cu")],
            extra_cuda_cflags=["-O3", "-gencode=arch=compute_90a,code=sm_90a"],
        )


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


def draw(lengths, dim):
    total = sum(lengths)
    q, k, v, dout = (torch.randn(total, HEADS, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q, k, v, dout, torch.rand(total, device="cuda") * math.log(1e7)


def ours(lengths, dim, sets, deterministic=False):
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    scale = dim**-0.5
    kernel = load_kernel()
    forwards, backwards = [], []
    for q, k, v, dout, w in sets:
        out, lse = kernel.forward(q, k, v, w, cu, cu, scale)
        forwards.append(lambda q=q, k=k, v=v, w=w: kernel.forward(q, k, v, w, cu, cu, scale))
        arguments = (dout, None, q, k, v, w, out, lse, cu, cu, scale, False, deterministic)
        backwards.append(lambda a=arguments: kernel.backward(*a))
    return forwards, backwards


def repeatable(lengths, dim, sets):
    return ours(lengths, dim, sets, deterministic=True)


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


def flash4(lengths, dim, sets):
    from flash_attn.cute import flash_attn_varlen_func

    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    def attention(q, k, v, w):
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(lengths), max_seqlen_k=max(lengths)
        )
        return out[0] if isinstance(out, tuple) else out

    return through_autograd(attention, sets)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--peers", nargs="*", default=["repeatable", "cudnn", "flex", "flash4"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", nargs="+", default=["1k x 16", "4k x 4", "16k x 1", "ragged"])
    options = parser.parse_args()
    cases = {"1k x 16": [1024] * 16, "4k x 4": [4096] * 4, "16k x 1": [16384], "ragged": ragged_lengths()}
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "bf16", HEADS, "heads")
    lengths = cases["ragged"]
    print(f"ragged: {len(lengths)} samples of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens")
    print("| case | d | kernel | forward TFLOP/s | backward TFLOP/s | forward ms | backward ms |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for dim in options.dims:
        for case in options.cases:
            lengths = cases[case]
            sets = [draw(lengths, dim) for _ in range(2)]
            flop = sum(4 * n * n * HEADS * dim for n in lengths)
            works, missing = {}, {}
            for name in ["ours", *options.peers]:
                try:
                    works[name] = globals()[name](lengths, dim, sets)
                    for work in (works[name][0][0], works[name][1][0]):
                        work()
                except Exception as error:  # a peer that cannot run is a row, not an end
                    works.pop(name, None)
                    missing[name] = f"{type(error).__name__}: {str(error)[:60]}".replace("\n", " ")
            forward = medians_ms({name: pair[0] for name, pair in works.items()}, options.rounds)
            backward = medians_ms({name: pair[1] for name, pair in works.items()}, options.rounds)
            for name in ["ours", *options.peers]:
                if name in missing:
                    print(f"| {case} | {dim} | {name} | {missing[name]} | | | |", flush=True)
                    continue
                f, b = forward[name], backward[name]
                rates = f"{flop / f / 1e9:.0f} | {2.5 * flop / b / 1e9:.0f}"
                print(f"| {case} | {dim} | {name} | {rates} | {f:.3f} | {b:.3f} |", flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
