"""The source patch applies to the file of the wheel it names, and what it makes still compiles."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import megatron.core
import pytest

from ta_plugin.megatron.arguments import add_ta_arguments, model_options

PATCHES = Path(__file__).parents[2] / "patches" / "megatron-lm"

pytestmark = pytest.mark.newest


def test_patch_applies_to_a_copy(tmp_path: Path) -> None:
    patch = PATCHES / f"core-{version('megatron-core')}.patch"  # __version__ ends in the commit of the current folder
    source = Path(megatron.core.__file__).parents[1] / "training" / "arguments.py"
    if not patch.exists() or not source.exists():
        pytest.skip(f"not run: there is no {patch.name}, or the installed wheel holds no megatron.training")
    target = tmp_path / "megatron" / "training" / "arguments.py"
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    subprocess.run(["patch", "-p1", "-i", str(patch)], cwd=tmp_path, check=True, capture_output=True)
    assert "return add_ta_arguments(parser)" in target.read_text()
    compile(target.read_text(), str(target), "exec")


def test_arguments_reach_the_model() -> None:
    parser = add_ta_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--ta-ssp-size", "4", "--ta-row-capacity", "64", "--ta-vocab-divisible-by", "256"])
    assert args.ta_ssp_size == 4
    options = {"row_multiple": 1, "row_capacity": 64, "vocab_divisible_by": 256}
    assert model_options(args) == options | {"deterministic": True}
    assert model_options(parser.parse_args(["--ta-nondeterministic"]))["deterministic"] is False
    args = parser.parse_args(["--ta-row-capacity", "64", "128"])
    assert model_options(args)["row_capacity"] == [64, 128]
