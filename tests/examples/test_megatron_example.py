"""The loop on megatron.core alone as its users run it: Ctrl-C, --load, and the losses of a run that nobody disturbed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

ROOT = Path(__file__).parents[2]


def command(*options: object) -> list[str]:
    return [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples/megatron/pretrain_gpt.py"), "--core", "--ta-ssp-size", "2", "--train-iters", "30",
        "--seq-length", "32", "--hidden-size", "16", *map(str, options),
    ]  # fmt: skip


def start(*options: object) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    return subprocess.Popen(
        command(*options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_interrupted_and_resumed_run_prints_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    whole, parts = start(), start("--save", tmp_path, "--save-interval", 4)
    assert parts.stdout is not None
    for line in parts.stdout:
        if "iteration    10" in line:
            parts.send_signal(signal.SIGINT)
            break
    stopped = parts.communicate(timeout=120)[0]
    found = re.search(rf"stopped after iteration (\d+); go on with --load {tmp_path}", stopped)
    assert found, stopped
    assert [path.name for path in tmp_path.glob("iter_*")] == [f"iter_{int(found[1]):07d}"]  # the newest alone
    again = start("--load", tmp_path)
    expected, resumed = (each.communicate(timeout=240)[0] for each in (whole, again))
    assert f"resumed after iteration {found[1]}" in resumed, resumed
    for line in re.findall(r"iteration +\d+  loss .*", resumed):
        assert line in expected, expected
    assert "iteration    30" in resumed


def test_another_number_of_cpu_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/megatron"))
    import checkpoints

    with pytest.raises(ValueError, match="was not written by CPU processes; load it on GPUs"):
        checkpoints.load_rank(tmp_path)
    for rank in range(2):
        (tmp_path / f"rank_{rank}.pt").touch()
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 1)
    with pytest.raises(ValueError, match="written by 2 CPU processes; start 2, not 1"):
        checkpoints.load_rank(tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoints.load(tmp_path, checkpoints.Resumable)
