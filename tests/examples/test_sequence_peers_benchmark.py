"""The benchmark of layout "sequence" beside Ulysses and torch's ring, on CPU: outputs are attention's, counted bytes the formulas'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("deepspeed", reason="not run: Ulysses is DeepSpeed's")


def test_ways_agree_and_send_what_the_formulas_say(tmp_path: Path) -> None:
    figures = tmp_path / "peers.json"
    command = [sys.executable, str(ROOT / "examples/benchmarks/sequence_peers.py"), "--ranks", "2", "--lengths", "600"]
    command += ["--heads", "2", "--head-dim", "8", "--dtype", "float32", "--repeats", "1", "--json", str(figures)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    bidirectional, causal = json.loads(figures.read_text())["cases"]
    assert not bidirectional["causal"] and causal["causal"]
    for case, count in ((bidirectional, 4), (causal, 2)):
        ran = {name: found for name, found in case["ways"].items() if "failed" not in found}
        assert len(ran) == count, case["ways"]
        for name, found in ran.items():
            assert found["error"] < 1e-5, (name, found)
            rows = case["distinct"] if name.startswith("distinct") else case["length"]
            assert found["bytes"] == found["formula"] == 2 * rows * 2 * 16 * 4, name  # 2 ranks: N - 1 = 2 (N - 1) / N
            assert found["ms"] > 0
        refused = [found["failed"] for found in case["ways"].values() if "failed" in found]
        assert all("context_parallel has no CPU kernel" in text for text in refused)
        assert case["once per batch"]["bytes"] > 0
