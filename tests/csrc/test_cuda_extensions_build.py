"""Every CUDA extension really builds, links and loads through its op builder: no GPU needed, a CUDA build of torch and nvcc are."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from ta_plugin.ops import operators
from ta_plugin.ops.builder import OpSpec, build, op_specs
from ta_plugin.ops.registry import define, is_compiled

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(
        torch.version.cuda is None or shutil.which("nvcc") is None, reason="needs torch with CUDA and nvcc"
    ),
]


@pytest.mark.parametrize("spec", [spec for spec in op_specs() if spec.device == "cuda"], ids=lambda spec: spec.name)
def test_extension_builds_and_registers_its_operators(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TA_CUDA_ARCHITECTURES", "90a")  # one is enough to see that it compiles
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")  # nvcc's minor version may differ from torch's
    for name in spec.operators:
        define(operators()[name])
    assert build(spec) is None
    assert all(is_compiled(name, "cuda") for name in spec.operators)
