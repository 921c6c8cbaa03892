"""What the benchmarks share prints tables as README.md holds them: conditions above, a cell for each column."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from ta_plugin.ops import load_op

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import measuring  # noqa: E402


def test_conditions_say_command_date_machine_and_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "cub_sort.so"
    library.touch()
    monkeypatch.setattr(sys, "argv", ["/some/where/ops.py", "--cub", str(library), "--name", "two words"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = measuring.conditions(torch.device("cpu"), "copy 3.02 TB/s", packages=("numpy", "no-such-package"))
    begins = "`python examples/benchmarks/ops.py --cub cub_sort.so --name 'two words'`, "
    assert found.startswith(f"{begins}{date.today().isoformat()}, 4 x CPU, ")
    assert f"torch {torch.__version__}, numpy " in found and "no-such-package not installed; copy 3.02 TB/s" in found
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert measuring.command().startswith("torchrun --nproc-per-node 4 examples/benchmarks/ops.py --cub")


def test_a_table_is_markdown_and_has_a_cell_for_each_column() -> None:
    lines: list[str] = []
    table = measuring.Table(["case", "ms"], lines.append)
    table.row("a", 1.5)
    assert lines == ["", "| case | ms |", "| --- | --- |", "| a | 1.5 |"]
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.row("b")


def test_target_attention_prints_one_table_of_all_its_cases() -> None:
    op = load_op("target_attention", device="cpu")
    if op.implementation != "compiled":
        pytest.skip(op.reason)
    sizes = ["--batch", "2", "--vocab", "50", "--dim", "16", "--rounds", "1", "--device", "cpu"]
    cases = ["--length", "20", "30", "--dtype", "float32", "bfloat16", "--targets", "1", "2", "--peers", "occurrences"]
    command = [sys.executable, str(BENCHMARKS / "target_attention.py"), *sizes, *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    above, _, *table = done.stdout.splitlines()
    assert above.startswith("`python examples/benchmarks/target_attention.py --batch 2 ")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert len({len(row) for row in cells}) == 1
    assert [(row[0][:2], *row[1:4]) for row in cells[2:]] == [
        (length, dtype, rows, way)
        for length in ("20", "30")
        for dtype in ("float32", "bfloat16")
        for rows in ("4", "8")
        for way in ("ours", "occurrences")
    ]
