"""Small launches of weighted attention for compute-sanitizer: every kind of walk, head_dim 64 and 128, both backwards.

compute-sanitizer --tool racecheck --print-limit 2000 python tests/gpu/weighted_attention_small.py [MODULE]
"""

import importlib
import sys

import torch

kernel = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "ta_weighted_attention")


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def main():
    torch.manual_seed(0)
    lengths, chunks = [1, 200, 64, 129], [1, 100, 100, 64, 129]
    walks = {
        "full": (lengths, {}),
        "causal": (lengths, {"causal": True}),
        "chunks": (
            chunks,
            {"cu_chunks": offsets([1, 2, 1, 1]), "k_visible": torch.tensor([1, 65, 200, 64, 0]).int().cuda()},
        ),
    }
    for dim in (64, 128):
        for name, (lengths_q, masks) in walks.items():
            heads, heads_kv, tokens = 2, 1, sum(lengths)
            q, dout = (torch.randn(tokens, heads, dim, device="cuda").bfloat16() for _ in range(2))
            k, v = (torch.randn(tokens, heads_kv, dim, device="cuda").bfloat16() for _ in range(2))
            shape = (len(lengths_q), tokens) if "cu_chunks" in masks else (tokens,)
            weight = torch.rand(shape, device="cuda").log()
            weight[..., ::9] = -torch.inf
            cu = offsets(lengths_q), offsets(lengths)
            scale = dim**-0.5
            out, lse = kernel.forward(q, k, v, weight, *cu, scale, **masks)
            for deterministic in (True, False):
                arguments = (dout, None, q, k, v, weight, out, lse, *cu, scale, True, deterministic)
                kernel.backward(*arguments, **masks)
                torch.cuda.synchronize()
                print(f"d={dim} {name} {'repeatable' if deterministic else 'atomic'}: ran", flush=True)


if __name__ == "__main__":
    main()
