"""The op builders really build and run; where they cannot, the fallback says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from ta_plugin.ops import Segments, segment_sum
from ta_plugin.ops.builder import load_op, op_specs, spec_of
from ta_plugin.ops.builder.load import segment_sum_in_torch


@pytest.fixture(scope="module")
def compiled() -> Any:
    pytest.importorskip("deepspeed")
    op = load_op("segment_sum")
    assert op.implementation == "compiled", op.reason
    return op


def segments(members: int, rows: int, seed: int) -> Segments:
    g = torch.Generator().manual_seed(seed)
    return Segments.from_index(torch.randint(0, max(rows, 1), (members,), generator=g), rows)


@pytest.mark.parametrize(
    ("members", "rows", "width"), [(0, 0, 3), (0, 4, 3), (1, 1, 1), (57, 9, 5), (300, 7, 0), (64, 64, 33)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_equals_plain_torch(compiled: Any, members: int, rows: int, width: int, dtype: torch.dtype) -> None:
    s = segments(members, rows, members)
    values = torch.randn(members, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out = compiled(values, s.order, s.offsets)
    expected = torch.zeros(rows, width, dtype=dtype).index_add_(0, s.index, values)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out, segment_sum_in_torch(values, s.order, s.offsets))
    torch.testing.assert_close(out, segment_sum(values, s))
    assert torch.equal(out, compiled(values, s.order, s.offsets))


def test_half_types_accumulate_in_float(compiled: Any) -> None:
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    s = Segments.from_index(torch.zeros(1000, dtype=torch.int64), 1)
    assert compiled(ones, s.order, s.offsets).item() == 1000  # in bf16 the sum would stop at 256


def test_torch_accepts_the_operator(compiled: Any) -> None:
    s = segments(20, 5, 0)
    torch.library.opcheck(torch.ops.ta_plugin.segment_sum.default, (torch.randn(20, 3), s.order, s.offsets))


@pytest.mark.parametrize(
    ("values", "order", "offsets", "expected"),
    [
        (torch.ones(3), torch.arange(3), torch.tensor([0, 3]), "pass floating"),
        (torch.ones(3, 1), torch.arange(2), torch.tensor([0, 2]), "order is"),
        (torch.ones(3, 1), torch.tensor([0, 1, 3]), torch.tensor([0, 3]), r"order\[2\] is 3"),
        (torch.ones(3, 1), torch.arange(3), torch.tensor([0, 4]), r"offsets\[1\] is 4"),
        (torch.ones(3, 1), torch.arange(3), torch.tensor([0, 2, 1]), r"offsets\[2\] is 1"),
    ],
)
def test_wrong_arguments_are_named(compiled: Any, values: Any, order: Any, offsets: Any, expected: str) -> None:
    with pytest.raises((ValueError, IndexError), match=expected):
        compiled(values, order, offsets)


def in_fresh_python(code: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_without_a_compiler_the_fallback_says_so() -> None:
    code = (
        "import warnings, torch; warnings.simplefilter('ignore')\n"
        "from ta_plugin.ops.builder import load_op\n"
        "op = load_op('segment_sum'); print(op.implementation, '|', op.reason)\n"
        "print(op(torch.ones(3, 1), torch.arange(3), torch.tensor([0, 1, 3])).flatten().tolist())"
    )
    out = in_fresh_python(code, CXX="no-such-compiler")
    assert "fallback | the C++ compiler 'no-such-compiler' is not on the path; install g++ or set CXX" in out
    assert "[1.0, 2.0]" in out


def test_importing_builds_and_imports_nothing() -> None:
    code = "import sys, ta_plugin.ops.builder; print('deepspeed' in sys.modules)"
    assert in_fresh_python(code).strip() == "False"


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        load_op("segment_product")
    with pytest.raises(ValueError, match="ta_segments_cpu"):
        spec_of("ta_nothing")


def test_environment_selects_what_is_built_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = op_specs()
    for name in ("TA_BUILD_OPS", "DS_BUILD_OPS", cpu.build_variable, cuda.build_variable):
        monkeypatch.delenv(name, raising=False)
    assert not cpu.wanted_ahead_of_time()
    monkeypatch.setenv("TA_BUILD_OPS", "1")
    monkeypatch.setenv("DS_BUILD_TA_WEIGHTED_ATTENTION", "0")
    assert cpu.wanted_ahead_of_time() and not cuda.wanted_ahead_of_time()
    monkeypatch.setenv("TA_BUILD_OPS", "0")
    monkeypatch.setenv("DS_BUILD_TA_SEGMENTS_CPU", "1")
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
    extension = builder_of(spec_of("ta_segments_cpu")).extension(root)
    assert extension.name == "ta_plugin.ops.ta_segments_cpu_op" and extension.sources == ["csrc/cpu/segment_sum.cpp"]
    assert not any("native" in arg for arg in extension.extra_compile_args["cxx"])
