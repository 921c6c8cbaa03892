"""The owner-step benchmark runs on CPU ranks: it checks its ways against each other, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_ranks_print_every_way_and_weak_scaling() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples/benchmarks/owner_step.py"), "--batch", "3", "--lengths", "48", "--vocab", "300", "--dim", "16",
        "--targets", "2", "--rounds", "1",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    line = r"^\| (\d+) \| 48 \| (\w+) \|(?:[^|]*\|){7} (\d+) \| ([\d.e-]+) \|"
    found = {(int(n), way): (int(calls), float(mib)) for n, way, calls, mib in re.findall(line, done.stdout, re.M)}
    sent = {key: mib for key, (_, mib) in found.items()}
    ways = ("dense", "unique", "owner", "captured")
    assert sent.keys() == {(n, way) for n in (1, 2) for way in ways}, done.stdout
    assert all(sent[1, way] == 0 for way in ways)
    assert all((calls > 0) == (ranks > 1) for (ranks, _), (calls, _) in found.items())
    assert 0 < sent[2, "unique"] < sent[2, "dense"] and sent[2, "owner"] > 0
    floors = re.findall(
        r"^\| (\d) \| 48 \| captured \|(?:[^|]*\|){4} ([\d.]+) \+ no --cub \+ ([\d.]+) \| ([\d.]+) \|  \|",
        done.stdout,
        re.M,
    )
    assert [(n, float(wire) > 0) for n, _, wire, _ in floors] == [("1", False), ("2", True)], done.stdout
    assert re.search(r"weak scaling, 2 ranks, L=48: dense \d+%, unique \d+%, owner \d+%, captured \d+%", done.stdout)
