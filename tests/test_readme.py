"""The README's code runs as it stands, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch


def run_the_snippet(code: str) -> tuple[list[int], list[int], str]:
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(dist.get_rank())
    names: dict[str, Any] = {
        "tokens": torch.randint(0, 1000, (32, 512), generator=generator),
        "lengths": torch.randint(0, 513, (32,), generator=generator),
        "targets": torch.randint(0, 1000, (32, 3), generator=generator),
        "print": lambda text: names.update(printed=str(text)),
    }
    exec(code, names)
    return list(names["out"].shape), list(names["scores"].shape), names["printed"]


def test_the_snippet(rank_pools: Any) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    joined = 'dist.init_process_group("gloo")'  # the pool's ranks have joined already
    assert joined in code[1]
    for out, scores, printed in rank_pools(2).run(run_the_snippet, code[1].replace(joined, "pass")):
        assert out == [32, 512, 64] and scores == [32, 3, 64]
        assert "plain, over positions" in printed and "owner" in printed
