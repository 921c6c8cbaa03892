"""The traffic benchmark of layout "sequence" as its users run it: counted bytes, formulas beside them, a plot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_prints_what_is_counted_beside_the_formulas(tmp_path: Path) -> None:
    plot = tmp_path / "traffic.png"
    command = [sys.executable, str(ROOT / "examples/benchmarks/sequence_layout.py"), "--ranks", "3", "--heads", "4"]
    command += ["--kv-heads", "2", "--head-dim", "8", "--lengths", "600", "2400", "--plot", str(plot)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert "counted bytes equal (N - 1) * U * 2 D, forward and backward" in run.stdout
    assert plot.stat().st_size > 10_000
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in run.stdout.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [600, 2400]
    for length, distinct, _, forward, backward, once, ring, ulysses, *ratios in rows:
        assert distinct < length / 2
        assert forward == backward == round(2 * distinct * 2 * 16 * 4 / 1e6, 2)  # (N - 1) U 2 D_kv floats
        assert ring == round(2 * length * 2 * 16 * 4 / 1e6, 2)
        assert ulysses == round(2 / 3 * length * (2 * 32 + 2 * 16) * 4 / 1e6, 2)
        assert once > 0
        assert ratios[0] == round(length / distinct, 1)
