"""The layer benchmark runs on a CPU at small size, and its two layers give the same outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "tokenized_layer.py"


def test_both_layers_agree_and_the_table_says_what_ran() -> None:
    pytest.importorskip("megatron.core")
    pytest.importorskip("tokenizers")
    small = ["--hidden", "32", "--heads", "2", "--text-length", "300", "--item-length", "100", "--item-batch", "2"]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--vocab", "400", "--rounds", "1", *small]
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert "megatron-core" in result.stdout.splitlines()[0]
    _, titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()[1:]]
    assert titles[:6] == ["data", "B x L", "L/U", "plan", "tokenized", "torch flash"]
    assert [row[0] for row in rows] == ["English", "Python", "Zipf items"]
    for row in rows:
        assert len(row) == len(titles)
        assert float(row[2]) > 1  # L/U
        assert float(row[-1]) < 1e-5  # fp32: the same layer
