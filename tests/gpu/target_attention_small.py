"""Target attention at small shapes, every kernel once, for compute-sanitizer: see target_attention.sh."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from target_attention_cases import draw, run

SHAPES = [(1, 1, 4), (2, 2, 4), (2, 1, 4), (9, 1, 4), (2, 1, 8), (5, 1, 8)]  # targets, kv heads, heads


def main() -> None:
    dims = {torch.bfloat16: [64, 120, 256], torch.float32: [40, 128, 256]}
    calls = 0
    for dtype, (targets, heads_kv, heads), one_table in product(dims, SHAPES, (True, False)):
        for dim in dims[dtype]:
            if dtype == torch.float32 and dim > 128 and not one_table:
                continue
            weights = ("key", "pair_head", None)[calls % 3]
            normaliser = "none" if calls % 5 == 4 else "softmax"
            case = draw(
                "cuda", [targets, 0, 1, targets], [300, 7, 0, 41], table=90, heads=heads, heads_kv=heads_kv, dim=dim,
                dtype=dtype, one_table=one_table, weights=weights, normaliser=normaliser, absent=0.2,
            )  # fmt: skip
            assert all(x.isfinite().all() for name, x in run(case).items() if name != "lse")
            calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
