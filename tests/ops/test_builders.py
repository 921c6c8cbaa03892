"""The op builders really build and run; where they cannot, the fallback says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from ta_plugin.ops import load_op, operators
from ta_plugin.ops.builder import op_specs, spec_of


def in_fresh_python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


SUM = (
    "import warnings, torch; warnings.simplefilter('ignore')\n"
    "from ta_plugin.ops import Segments, load_op, segment_sum\n"
    "from ta_plugin.ops.registry import is_compiled\n"
    "segments = Segments.from_index(torch.tensor([0, 1, 1]), 2)\n"
)


def test_without_a_compiler_the_fallback_says_so() -> None:
    code = (
        "op = load_op('segment_sum'); print(op.implementation, '|', op.reason)\n"
        "print(op(torch.ones(3, 1), *segments.tensors()).flatten().tolist())"
    )
    out = in_fresh_python(SUM + code, CXX="no-such-compiler")
    assert "fallback | the C++ compiler 'no-such-compiler' is not on the path; install g++ or set CXX" in out
    assert "[1.0, 2.0]" in out


def test_without_deepspeed_the_remedy_is_one_that_works() -> None:
    code = (
        "import sys\nclass Gone:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'deepspeed': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Gone()); print(load_op('segment_sum').reason)"
    )
    out = in_fresh_python(SUM + code)
    assert "DeepSpeed, whose op builders compile it, is not installed; pip install deepspeed, or in a checkout" in out
    assert "ta_plugin[" not in out  # of no index


def test_a_call_on_the_cpu_compiles_nothing() -> None:
    code = (
        "print(segment_sum(torch.ones(3, 1), segments).flatten().tolist())\n"
        "import sys; print(is_compiled('segment_sum', 'cpu'), 'deepspeed' in sys.modules)\n"
        "before = [hasattr(torch.ops.ta_plugin, name) for name in ('segment_sum', 'expand')]; print(before)"
    )
    assert in_fresh_python(SUM + code).split("\n")[:3] == ["[1.0, 2.0]", "False False", "[True, False]"]


def test_what_was_built_ahead_of_time_is_used(tmp_path: Path) -> None:
    """A stand-in for the module that setup.py builds: it registers a kernel that answers 7."""
    (tmp_path / "ta_cpu_op.py").write_text(
        "import torch\n"
        "torch.library.impl('ta_plugin::segment_sum', 'CPU', lambda v, i, o, f: v.new_full((f.numel() - 1, 1), 7.0))\n"
    )
    code = (
        f"import ta_plugin.ops; ta_plugin.ops.__path__.append({str(tmp_path)!r})\n"
        "print(segment_sum(torch.ones(3, 1), segments).flatten().tolist(), is_compiled('segment_sum', 'cpu'))\n"
        "print(load_op('segment_sum').implementation, load_op('segment_sum', compile=False).implementation)"
    )
    assert in_fresh_python(SUM + code).split("\n")[:2] == ["[7.0, 7.0] True", "compiled fallback"]


def test_what_was_built_for_another_torch_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "ta_cpu_op.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c105Error', path='here/ta_cpu_op.so')\n"
    )
    code = (
        f"import ta_plugin.ops; ta_plugin.ops.__path__.append({str(tmp_path)!r}); warnings.simplefilter('default')\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    print(segment_sum(torch.ones(3, 1), segments).flatten().tolist(), is_compiled('segment_sum', 'cpu'))\n"
        "print(len(said), said[0].message)"
    )
    value, warning = in_fresh_python(SUM + code).splitlines()
    assert value == "[1.0, 2.0] False"
    assert warning.startswith(
        f"1 here/ta_cpu_op.so does not load with torch {torch.__version__} (undefined symbol: _ZN3c105Error)"
    )
    assert "DS_BUILD_TA_CPU=1 python setup.py build_ext --inplace" in warning


def test_every_operator_has_a_kernel_for_both_devices() -> None:
    for device in ("cpu", "cuda"):
        listed = [name for spec in op_specs() if spec.device == device for name in spec.operators]
        assert sorted(listed) == sorted(operators()), device


def test_importing_builds_and_imports_nothing() -> None:
    code = "import sys, torch, ta_plugin.ops; ops = torch.ops.ta_plugin; print('deepspeed' in sys.modules, hasattr(ops, 'expand'))"
    assert in_fresh_python(code).split() == ["False", "False"]


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        load_op("segment_product")
    with pytest.raises(ValueError, match="pass 'cpu' or 'cuda'"):
        load_op("segment_sum", device="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ta_cpu"):
        spec_of("ta_nothing")


def test_environment_selects_what_is_built_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = spec_of("ta_cpu"), spec_of("ta_weighted_attention")
    for name in ("TA_BUILD_OPS", "DS_BUILD_OPS", cpu.build_variable, cuda.build_variable):
        monkeypatch.delenv(name, raising=False)
    assert not cpu.wanted_ahead_of_time()
    monkeypatch.setenv("TA_BUILD_OPS", "1")
    monkeypatch.setenv("DS_BUILD_TA_WEIGHTED_ATTENTION", "0")
    assert cpu.wanted_ahead_of_time() and not cuda.wanted_ahead_of_time()
    monkeypatch.setenv("TA_BUILD_OPS", "0")
    monkeypatch.setenv("DS_BUILD_TA_CPU", "1")
    assert cpu.wanted_ahead_of_time()


def test_cuda_flags_and_reasons() -> None:
    pytest.importorskip("deepspeed")
    from ta_plugin.ops.builder.classes import builder_of, missing_for, torch_architectures
    from ta_plugin.ops.builder.specs import OpSpec

    spec = OpSpec("ta_every", "weighted_attention", "cuda")
    assert torch_architectures(spec) == "8.0;9.0;10.0"
    flags = builder_of(spec).nvcc_args()
    assert [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")] == flags[-3:]
    assert "no sources" in str(missing_for(OpSpec("ta_no", "nowhere", "cuda")))
    if torch.version.cuda is None:
        builder = builder_of(OpSpec("ta_cpu_only", "cpu", "cuda"))
        assert not builder.is_compatible() and "built without CUDA" in builder.error_log


def test_wheels_are_not_bound_to_this_machine() -> None:
    pytest.importorskip("deepspeed")
    from ta_plugin.ops.builder.classes import builder_of

    root = Path(__file__).parents[2]
    extension = builder_of(spec_of("ta_cpu")).extension(root)
    assert extension.name == "ta_plugin.ops.ta_cpu_op" and "csrc/cpu/segments.cpp" in extension.sources
    assert not any("native" in arg for arg in extension.extra_compile_args["cxx"])
