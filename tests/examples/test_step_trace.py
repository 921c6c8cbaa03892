"""The profile of the owner step runs on CPU ranks, and its arithmetic of spans is right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples/benchmarks"


@pytest.fixture
def step_trace(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("step_trace", FOLDER / "step_trace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "step_trace", module)
    spec.loader.exec_module(module)
    return module


def test_spans(step_trace: ModuleType) -> None:
    a = step_trace.union([(5, 7), (0, 2), (1, 3), (3, 4)])
    assert a == [(0, 4), (5, 7)] and step_trace.length(a) == 6
    assert step_trace.common(a, step_trace.union([(3, 6), (6.5, 20)])) == 2.5
    assert step_trace.common(a, []) == 0


def test_a_phase_counts_what_it_launched_wherever_that_ran(step_trace: ModuleType) -> None:
    def event(name: str, begin: float, end: float, kind: str, correlation: int | None = None) -> dict[str, object]:
        args = {} if correlation is None else {"correlation": correlation}
        return {"name": name, "ts": 1e3 * begin, "dur": 1e3 * (end - begin), "cat": kind, "args": args}

    events = [
        event("forward", 0, 10, "user_annotation"),
        event("cudaLaunchKernel", 1, 2, "cuda_runtime", 1),
        event("cudaLaunchKernelExC", 3, 4, "cuda_runtime", 2),
        event("cudaLaunchKernel", 11, 12, "cuda_runtime", 3),
        event("cudaStreamSynchronize", 5, 6, "cuda_runtime"),
        event("ncclDevKernel_SendRecv", 8, 20, "kernel", 1),  # past the phase's end on the host
        event("gemm", 15, 25, "kernel", 2),
        event("of another phase", 8, 9, "kernel", 3),
    ]
    events.append(event("cudaGraphLaunch", 6, 7, "cuda_runtime", 4))
    phase = step_trace.Phase.of(events, "forward")
    assert (phase.wall, phase.collective, phase.compute, phase.both) == (10, 12, 10, 5)
    assert (phase.launches, phase.waits) == (3, 1)


@pytest.mark.parametrize(("way", "phases"), [("owner", ["forward", "backward"]), ("captured", ["replay"])])
def test_two_ranks_print_their_phases_and_leave_their_traces(tmp_path: Path, way: str, phases: list[str]) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FOLDER / "step_trace.py"),
        "--batch", "3", "--lengths", "48", "--vocab", "300", "--dim", "16", "--targets", "2", "--folder", str(tmp_path), "--way", way,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\| 48 \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", done.stdout, re.M)
    assert [name for name, *_ in found] == phases, done.stdout
    assert all(float(ms) > 0 for _, *each in found for ms in each)
    assert sorted(x.name for x in tmp_path.iterdir()) == [f"{way}.L48.rank{r}.json.gz" for r in range(2)]
