"""The long-context examples as their users run them, small: tables, files and plots."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples/long_context" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(folder: Path, plot: str) -> dict[str, Any]:
    assert (folder / plot).stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_genome(tmp_path: Path) -> None:
    # a genome with structure: a few motifs over and over, so that neighbours tell what is hidden
    draw = random.Random(0)
    motifs = ["".join(draw.choices("ACGT", k=12)) for _ in range(4)]
    (tmp_path / "small.fa").write_text(">small\n" + "\n".join("".join(draw.choices(motifs, k=6)) for _ in range(400)))
    printed = run(
        "genome.py", "--fasta", str(tmp_path / "small.fa"), "--out", str(tmp_path), "--k", "4", "--steps", "120",
        "--spans", "16", "--dim", "32", "--flank", "16", "--repeats", "1", "--device", "cpu",
    )  # fmt: skip
    assert "28,800 bases" in printed and "a table of 4-mers" in printed
    found = results(tmp_path, "genome.png")
    assert found["models"][0]["name"] == "window and genome"
    assert all(model["bits"] < 1.8 for model in found["models"])  # composition alone: about 2
    assert all(cost["difference"] < 1e-4 for cost in found["costs"]) and len(found["costs"]) == 2


def test_pretrain_text(tmp_path: Path) -> None:
    for folder in range(11):
        (tmp_path / "text" / f"part{folder:02}").mkdir(parents=True)
        for file in range(2):
            lines = [f"def function_{i % 7}(value):\n    return value + {i % 5}\n" for i in range(60)]
            (tmp_path / "text" / f"part{folder:02}" / f"f{file}.py").write_text("\n".join(lines))
    printed = run(
        "pretrain_text.py", "--folder", str(tmp_path / "text"), "--out", str(tmp_path), "--context", "96", "--batch", "2",
        "--steps", "20", "--vocab", "300", "--dim", "32", "--heads", "2", "--layers", "2", "--window", "16",
        "--global-every", "2", "--evaluations", "2", "--validation", "2", "--device", "cpu",
    )  # fmt: skip
    assert "validation loss" in printed
    found = results(tmp_path, "curves.png")
    assert [model["name"] for model in found["models"]] == ["rotary", "mixed", "window"]
    for model in found["models"]:
        (first, _, before), *_, (last, _, after) = model["points"]
        assert (first, last) == (0, 20) and after < before - 0.5
    assert found["occurrences_per_distinct"] > 2
    first, *others = found["equal_time"]
    assert first == found["models"][0]
    for other in others:  # about the first one's time, on whatever machine runs this
        assert 0.2 < other["points"][-1][1] / first["points"][-1][1] < 5
