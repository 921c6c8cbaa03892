"""CUDA extensions through DeepSpeed's builder: compiled, linked and imported, with a CUDA build of torch but without a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

pytest.importorskip("deepspeed")

from cuda_folder import cuda_of_version, tool

from ta_plugin.ops import operators
from ta_plugin.ops.builder import OpSpec, op_specs
from ta_plugin.ops.builder.classes import builder_of, missing_for
from ta_plugin.ops.builder.specs import source_root
from ta_plugin.ops.builder.toolkit import cuda_toolkit
from ta_plugin.ops.registry import define, is_compiled

SPECS = [spec for spec in op_specs() if spec.device == "cuda"]


def why_not() -> str | None:
    """What keeps this machine from building CUDA extensions."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: nothing to link with"
    return next((reason for spec in SPECS if (reason := missing_for(spec)) is not None), None)


def test_every_source_belongs_to_an_extension() -> None:
    """What no extension names, nothing would compile."""
    kinds = {".cpp", ".cu"}
    found = {path for path in source_root().rglob("*") if path.suffix in kinds}
    assert found == {path for spec in op_specs() for path in spec.sources()}


@pytest.mark.newest
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_links_and_registers_its_operators(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TA_CUDA_ARCHITECTURES", "90a")  # one is enough to see that it compiles
    for name in spec.operators:
        define(operators()[name])
    module = builder_of(spec).load()
    assert all(is_compiled(name, "cuda") for name in spec.operators)
    toolkit = cuda_toolkit()
    assert toolkit is not None
    if (toolkit / "bin" / "cuobjdump").is_file():
        listed = subprocess.run(
            [toolkit / "bin" / "cuobjdump", "--list-elf", module.__file__], capture_output=True, text=True
        )
        assert "sm_90a" in listed.stdout, listed.stdout + listed.stderr
    if spec.name == "ta_weighted_attention":  # the binding runs, and says what it wants
        rows, bounds = torch.zeros(2, 1, 64, dtype=torch.bfloat16), torch.tensor([0, 2], dtype=torch.int32)
        with pytest.raises(ValueError, match="q must be on a CUDA device"):
            module.forward(rows, rows, rows, torch.zeros(2), bounds, bounds, 0.125)


@pytest.mark.newest
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_ahead_of_time_uses_the_same_flags(spec: OpSpec) -> None:
    extension = builder_of(spec).extension(Path(__file__).parents[2])
    for architecture in spec.architectures:
        assert f"-gencode=arch=compute_{architecture},code=sm_{architecture}" in extension.extra_compile_args["nvcc"]
    assert str(cuda_toolkit() / "include") in extension.include_dirs
    assert all(not os.path.isabs(source) for source in extension.sources)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """toolkit(version): a folder that looks like a CUDA toolkit; of the path and the environment only what builds C++ is left."""
    tool(tmp_path / "bin" / "c++")
    tool(tmp_path / "bin" / "ninja")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return lambda version: cuda_of_version(tmp_path / f"cuda-{version}", version)


def test_the_toolkit_is_where_its_headers_are(toolkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = toolkit("13.0")
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert cuda_toolkit() == home
    (tmp_path / "bin" / "nvcc").unlink()
    tool(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')  # torch takes the folder above this one
    assert cuda_toolkit() in (None, Path("/usr/local/cuda"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert cuda_toolkit() == home


def test_a_toolkit_that_does_not_fit_is_named(toolkit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit("12.9")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "is of CUDA 12.9, torch of 13.0; set CUDA_HOME to a toolkit of CUDA 13" in str(missing_for(SPECS[0]))
    monkeypatch.setattr(torch.version, "cuda", "12.4")  # minor versions link with each other
    assert missing_for(SPECS[0]) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert "nowhere', which holds no nvcc with its headers; install" in str(missing_for(SPECS[0]))
