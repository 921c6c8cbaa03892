"""The source patch applies to the supported DeepSpeed, and makes it honour the block."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches" / "deepspeed"

RUN = """
import json, sys, torch
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from deepspeed.runtime.engine import DeepSpeedEngine
from ta_plugin import ShardedTokenEmbedding, TokenizedAttention
before = DeepSpeedEngine.__init__
model = torch.nn.Sequential(torch.nn.Linear(4, 1))
model.attention = TokenizedAttention(2, 3, 1, ShardedTokenEmbedding(5, 4))
model.forward = lambda ids, lengths: model[0](model.attention(ids, lengths)).square().sum()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=json.loads(sys.argv[1]))[0]
rows = model.attention.embedding_fn.rows.clone()
engine.backward(engine(torch.tensor([[0, 1, 1], [2, 2, 0]]), torch.tensor([3, 2])))
engine.step()
print("RESULT", deepspeed.__file__, before is DeepSpeedEngine.__init__, not torch.equal(rows, model.attention.embedding_fn.rows))
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A folder with DeepSpeed as installed, its patched file replaced."""
    import deepspeed

    if deepspeed.__version__ != "0.19.8":
        pytest.skip(f"the patch is for 0.19.8, installed is {deepspeed.__version__}")
    installed = Path(deepspeed.__file__).parent
    package = tmp_path / "deepspeed"
    package.mkdir()
    for entry in installed.iterdir():
        if entry.name == "__init__.py":
            shutil.copy(entry, package)
        else:
            (package / entry.name).symlink_to(entry)
    patch = PATCHES / "tokenized_attention-0.19.8.patch"
    applied = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-i", str(patch)], cwd=tmp_path, capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stdout + applied.stderr
    return tmp_path


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the patch command")
def test_patched_deepspeed_honours_the_block(patched: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "tokenized_attention": {"size": 1},
        "zero_optimization": {"stage": 0},
    }
    root = Path(__file__).parents[2]
    env = {
        **os.environ,
        **dict(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1"),
        "MASTER_PORT": str(port),
        "PYTHONPATH": f"{patched}:{root}",
    }
    command = [sys.executable, "-c", RUN, json.dumps(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert result == [f"RESULT {patched / 'deepspeed' / '__init__.py'} True True"], done.stdout + done.stderr
    command[-1] = json.dumps({**config, "tokenised_attention": {}})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "did you mean 'tokenized_attention'" in done.stderr
