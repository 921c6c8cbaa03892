"""`pip install .`: operators built ahead of time where asked, and sources to build them from where not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ta_plugin.ops.builder import op_specs

ROOT = Path(__file__).parents[2]
CPU = next(spec for spec in op_specs() if spec.device == "cpu")
# minutes each, where torch has CUDA
NO_CUDA = {spec.build_variable: "0" for spec in op_specs() if spec.device == "cuda"}
SHOW = f"""
import importlib, torch, ta_plugin
from ta_plugin.ops.builder import spec_of
from ta_plugin.ops.builder.classes import missing_for
spec = spec_of({CPU.name!r})
print("package", ta_plugin.__file__)
print("sources", *spec.sources())
print("missing", missing_for(spec))
try:
    print("module", importlib.import_module(spec.module).__file__)
    print("operators", all(torch._C._dispatch_has_kernel_for_dispatch_key("ta_plugin::" + name, "CPU") for name in spec.operators))
except ModuleNotFoundError as error:
    print("module", None)
"""


def install(folder: Path, **environment: str) -> dict[str, str]:
    """Install a copy of the checkout into a folder of its own; what Python says that finds the package there."""
    checkout, site = folder / "checkout", folder / "site"
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    shutil.copytree(ROOT / "ta_plugin", checkout / "ta_plugin", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    env = {name: value for name, value in os.environ.items() if "_BUILD_" not in name} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # ninja
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(site), "."], cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(checkout)
    env["PYTHONPATH"] = str(site)
    shown = subprocess.run([sys.executable, "-c", SHOW], cwd=folder, env=env, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    facts = dict(line.split(" ", 1) for line in shown.stdout.splitlines() if " " in line)
    assert facts["package"].startswith(str(site))
    assert facts["sources"].startswith(str(site / "ta_plugin" / "csrc")) and facts["missing"] == "None"
    return facts


def test_operators_are_built_where_asked(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    facts = install(tmp_path, TA_BUILD_OPS="1", **NO_CUDA)
    assert facts["module"].startswith(str(tmp_path / "site" / "ta_plugin" / "ops")) and facts["operators"] == "True"
    assert [path.name.split("_op.")[0] for path in (tmp_path / "site").rglob("*.so")] == [CPU.name]


def test_one_variable_keeps_an_operator_from_being_built(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    facts = install(tmp_path, TA_BUILD_OPS="1", **NO_CUDA, **{CPU.build_variable: "0"})
    assert facts["module"] == "None"


def test_an_operator_asked_for_by_name_must_build(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(
        AssertionError, match=f"{CPU.build_variable}=1, but {CPU.name} cannot be built: the C.. compiler"
    ):
        install(tmp_path, CXX="no-such-compiler", **{CPU.build_variable: "1"})
