"""Small launches of weighted attention for compute-sanitizer: every kind of walk, head_dim 64 and 128, both backwards.

compute-sanitizer --tool racecheck --print-limit 2000 python tests/gpu/weighted_attention_small.py [forward]

forward: leaves the backward passes out.
"""

import sys

import torch

from ta_plugin.ops.builder import load_extension

loaded = load_extension("ta_weighted_attention")
if loaded.kernels is None:
    sys.exit(loaded.reason)
kernel = loaded.kernels


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def main():
    torch.manual_seed(0)
    backwards = () if sys.argv[1:] == ["forward"] else (True, False)
    few, chunks = [1, 200, 64, 129], [1, 100, 100, 64, 129]
    many = [700] + [64] * 150  # more tiles than multiprocessors, one of them longer than a ring of stages
    walks = {
        "full": (few, few, {}),
        "many": (many, many, {}),
        "parts": ([1100, 64], [129, 64], {}),  # backward: so many queries that blocks share a tile of keys
        "causal": (few, few, {"causal": True}),
        "chunks": (
            chunks,
            few,
            {"cu_chunks": offsets([1, 2, 1, 1]), "k_visible": torch.tensor([1, 65, 200, 64, 0]).int().cuda()},
        ),
    }
    for dim in (64, 128):
        for name, (lengths_q, lengths_k, masks) in walks.items():
            heads, heads_kv, tokens = 2, 1, sum(lengths_k)
            q, dout = (torch.randn(sum(lengths_q), heads, dim, device="cuda").bfloat16() for _ in range(2))
            k, v = (torch.randn(tokens, heads_kv, dim, device="cuda").bfloat16() for _ in range(2))
            shape = (len(lengths_q), tokens) if "cu_chunks" in masks else (tokens,)
            weight = torch.rand(shape, device="cuda").log()
            weight[..., ::9] = -torch.inf
            cu = offsets(lengths_q), offsets(lengths_k)
            scale = dim**-0.5
            out, lse = kernel.forward(q, k, v, weight, *cu, scale, **masks)
            torch.cuda.synchronize()
            print(f"d={dim} {name} forward: ran", flush=True)
            for deterministic in backwards:
                arguments = (dout, None, q, k, v, weight, out, lse, *cu, scale, True, deterministic)
                kernel.backward(*arguments, **masks)
                torch.cuda.synchronize()
                print(f"d={dim} {name} {'repeatable' if deterministic else 'atomic'}: ran", flush=True)


if __name__ == "__main__":
    main()
