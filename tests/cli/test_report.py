"""`report` tells the truth without CUDA, with nvcc only, and with a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from cuda_folder import cuda_of_version, tool
from typer.testing import CliRunner

from ta_plugin.cli import report as module
from ta_plugin.cli.main import app


def run(*arguments: str) -> dict[str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["report", "--json", *arguments])
    assert result.exit_code == 0, result.output
    return {line["name"]: line for line in json.loads(result.output[result.output.index("[") :])}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path on which only the tools that a test creates exist."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))  # or the usual places would be looked at
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_cuda(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)
    facts = run()
    assert facts["nvcc"]["state"] == "missing" and facts["GPU"]["state"] == "missing"
    assert facts["CUDA in torch"]["detail"].endswith("is built without it")
    assert facts["C++ compiler"]["state"] == "missing"
    assert facts["cpu, torch.float32, head_dim 64"]["detail"].startswith("sdpa")
    assert facts["backend flex"]["state"] == "missing"
    assert facts["ta_weighted_attention"]["state"] == "missing"
    assert "no ranks to divide" in facts["layout"]["detail"]


def test_compiler_alone_builds_the_cpu_ops(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    without_cuda(monkeypatch)
    assert "'c++' is not on the path" in run()["ta_cpu"]["detail"]
    tool(tools / "c++")
    tool(tools / "ninja")
    facts = run()
    assert facts["ta_cpu"]["state"] == "ok" and "until ta_plugin.ops.load_op builds it" in facts["ta_cpu"]["detail"]


def test_nvcc_without_a_gpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    without_cuda(monkeypatch)
    for name in ("c++", "ninja", "nvcc"):
        tool(tools / name)
    monkeypatch.setenv("CUDA_HOME", str(cuda_of_version(tools / "cuda", "13.0")))
    monkeypatch.setattr(module, "op_specs", lambda: [module.OpSpec("ta_any", "cpu", "cuda")])
    facts = run()
    assert facts["nvcc"]["state"] == "ok" and facts["nvcc"]["detail"] == f"13.0, in {tools / 'cuda'}"
    assert facts["ta_any"]["state"] == "missing" and "nothing links against this torch" in facts["ta_any"]["detail"]


def test_with_a_gpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "A GPU")
    for name in ("c++", "ninja"):
        tool(tools / name)
    monkeypatch.setenv("CUDA_HOME", str(cuda_of_version(tools / "cuda", "13.0")))
    monkeypatch.setattr(module, "op_specs", lambda: [module.OpSpec("ta_any", "cpu", "cuda")])
    facts = run()
    assert facts["GPU 0"]["detail"] == "A GPU, sm_90"
    assert facts["nvcc"]["detail"] == f"13.0, in {tools / 'cuda'}"
    assert facts["ta_any"]["state"] == "ok"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (12, 0))
    assert run()["ta_any"]["detail"].endswith("for sm_80, sm_90a, sm_100, but this GPU is sm_120")
    assert facts["backend sdpa"]["state"] == "missing"
    assert facts["cuda, torch.bfloat16, head_dim 64"]["detail"].startswith("hopper (the fastest as measured")
    assert facts["backend hopper"]["state"] == "ok"  # nvcc is found: it builds on first use
    assert "flash-attn-4 is not installed" in facts["backend flash4"]["detail"]


def test_cuda_in_torch_without_a_gpu(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What builds is one thing, what runs another: without a GPU attention runs on the CPU."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("c++", "ninja"):
        tool(tools / name)
    monkeypatch.setattr(module, "op_specs", lambda: [module.OpSpec("ta_any", "cpu", "cuda")])
    monkeypatch.setenv("CUDA_HOME", str(tools))
    facts = run()
    assert facts["nvcc"]["state"] == facts["ta_any"]["state"] == "missing"
    assert "holds no nvcc" in facts["ta_any"]["detail"] and facts["ta_any"]["detail"] == facts["nvcc"]["detail"]
    monkeypatch.setenv("CUDA_HOME", str(cuda_of_version(tools / "cuda", "12.9")))
    assert "is of CUDA 12.9, torch of 13.0" in run()["ta_any"]["detail"]
    monkeypatch.setenv("CUDA_HOME", str(cuda_of_version(tools / "newer", "13.1")))
    facts = run()
    assert (
        facts["ta_any"]["detail"]
        == "not built yet; builds on first use, for sm_80, sm_90a, sm_100 (no GPU here to run it)"
    )
    assert facts["GPU"]["state"] == "missing" and facts["cpu, torch.float32, head_dim 64"]["detail"].startswith("sdpa")


def test_versions_outside_the_range_are_a_warning(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "deepspeed": "0.18.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise module.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(module.metadata, "version", version)
    facts = run()
    assert [facts[name]["state"] for name in ("torch", "deepspeed", "megatron-core")] == ["ok", "warning", "missing"]


def test_layout_under_torchrun(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    facts = run("--size", "2")
    assert facts["SSP"]["detail"] == "2 group(s) of 2 rank(s), 2 replica(s) of each row"
    assert facts["group 1"]["detail"] == "ranks 2 to 3"
    assert "choose one of [1, 2, 4]" in run("--size", "3")["layout"]["detail"]


def test_prints_tables() -> None:
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 0
    for section in ("Hosts", "Devices", "Ops", "Attention", "Groups"):
        assert section in result.output


def test_brackets_in_a_detail_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ops", lambda: [module.Line("Ops", "ta_cpu", "missing", "pip install deepspeed[some]")])
    assert "pip install deepspeed[some]" in CliRunner().invoke(app, ["report"]).output


def test_json_is_all_that_goes_to_standard_output() -> None:
    """Also where DeepSpeed has to say which accelerator it took."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "ta_plugin.cli.main", "report", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=True)
    assert {"Hosts", "Ops", "Groups"} <= {line["section"] for line in json.loads(done.stdout)}
