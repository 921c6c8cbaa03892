"""The DeepSpeed example as its users run it: two nodes, one process each, over the loopback interface; then --resume."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_interactions import write_interactions

pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
# DeepSpeed would first compile shared-memory collectives for two minutes
SITE = 'import deepspeed; deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'


def on_two_nodes(folder: Path, *options: str) -> str:
    """What node 0 prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = [
        "bash",
        str(ROOT / "examples/deepspeed/two_nodes.sh"),
        "127.0.0.1",
        "other-node",
        str(folder / "small.inter"),
    ]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", SLOTS="1", MASTER_PORT=str(port)),
    }
    nodes = [
        subprocess.Popen(
            [*script, "--out", str(folder / "run"), "--length", "10", *options],
            env=environment | {"NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    return outputs[0]


def test_two_nodes_train_and_resume(tmp_path: Path) -> None:
    write_interactions(tmp_path / "small.inter")
    (tmp_path / "sitecustomize.py").write_text(SITE)
    first = on_two_nodes(tmp_path, "--steps", "5")
    # groups do not leave their node; rows are replicated between the two
    assert "tokenized_attention: 1 rank(s) per SSP group, 2 replica(s)" in first
    assert re.search(r"30 items, \d+ steps an epoch of 64 samples on each of 2 rank\(s\); ZeRO stage 1", first)
    assert re.search(r"step 5/5: loss \d", first) and re.search(r"test: auc 0\.\d+", first)
    again = on_two_nodes(tmp_path, "--steps", "7", "--resume")
    assert "resumed after step 5" in again and re.search(r"step 7/7: loss \d", again)
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5_000
    assert (tmp_path / "run" / "global_step7" / "tokenized_attention").is_dir()


def test_resuming_where_nothing_was_saved_is_refused() -> None:
    spec = importlib.util.spec_from_file_location("deepspeed_example", ROOT / "examples/deepspeed/train.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    engine = SimpleNamespace(load_checkpoint=lambda folder: (None, {}))  # what DeepSpeed's gives for such a folder
    with pytest.raises(
        SystemExit, match="--resume: runs/none holds no checkpoint; leave --resume out, or name its folder"
    ):
        example.resume(engine, "runs/none")
