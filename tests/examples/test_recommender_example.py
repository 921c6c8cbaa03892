"""The recommender example as its users run it: torchrun, Ctrl-C, --resume, table and curves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from small_interactions import write_interactions

ROOT = Path(__file__).parents[2]


def command(inter: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples/recommender/train.py"), "--inter", str(inter), "--out", str(out), "--class-columns", "rating",
        "--steps", "40", "--class-steps", "10", "--batch-size", "8", "--dim", "8", "--recent-length", "5", "--long-length", "10",
        "--negatives", "3", *options,
    ]  # fmt: skip


def test_interrupted_and_resumed_run_prints_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    inter = write_interactions(tmp_path / "small.inter")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    whole = subprocess.run(
        command(inter, tmp_path / "whole"), env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert whole.returncode == 0, whole.stderr

    started = subprocess.Popen(
        command(inter, tmp_path / "parts"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    for line in started.stdout:
        if "step 25/40" in line:
            started.send_signal(signal.SIGINT)
            break
    rest, errors = started.communicate(timeout=120)
    assert "stopped in run 'items'" in rest, rest + errors
    resumed = subprocess.run(
        command(inter, tmp_path / "parts", "--resume"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "items: step 25/40" not in resumed.stdout  # it went on from where it stopped
    quality = re.compile(r"│ (?:items|rating|\(popularity\)).*│")
    assert quality.findall(whole.stdout)[:4] == quality.findall(resumed.stdout)[:4]
    assert (tmp_path / "parts" / "curves.png").stat().st_size > 10_000
