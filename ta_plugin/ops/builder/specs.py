"""Which operators csrc/ holds: names, sources and how they would be built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CUDA_ARCHITECTURES = ("80", "90a", "100")  # built ahead of time; a kernel that needs one of them says so in its spec

ROW_OPERATORS = ("segment_sum", "segment_logsumexp", "expand", "merge", "merge_into", "merge_backward")
PLAN_OPERATORS = ("unique", "group", "owners", "local_rows", "partition")
BUCKET_OPERATORS = ("bucket", "bounds", "compact", "spread")
TARGET_OPERATORS = ("target_attention", "target_attention_backward")


@dataclass(frozen=True)
class OpSpec:
    """One extension.

    name:          of the built module; prefixed, since DeepSpeed caches extensions by it
    folder:        of its sources, relative to csrc/
    device:        "cpu" or "cuda"
    operators:     names under torch.ops.ta_plugin that importing it registers; empty for a module of plain functions
    architectures: sm numbers a CUDA extension is built for
    """

    name: str
    folder: str
    device: Literal["cpu", "cuda"]
    operators: tuple[str, ...] = ()
    architectures: tuple[str, ...] = CUDA_ARCHITECTURES

    @property
    def module(self) -> str:
        """Import path of the extension when setup.py built it."""
        return f"ta_plugin.ops.{self.name}_op"

    @property
    def build_variable(self) -> str:
        """The environment variable that selects this op ahead of time, as DeepSpeed's DS_BUILD_<OP>."""
        return f"DS_BUILD_{self.name.upper()}"

    def sources(self) -> list[Path]:
        """Absolute paths."""
        folder = source_root() / self.folder
        kinds = ("*.cpp",) if self.device == "cpu" else ("*.cpp", "*.cu")
        return sorted(path for kind in kinds for path in folder.glob(kind))

    def wanted_ahead_of_time(self) -> bool:
        """Whether setup.py builds it: DS_BUILD_<NAME> decides where it is set, TA_BUILD_OPS or DS_BUILD_OPS otherwise."""
        everything = os.environ.get("TA_BUILD_OPS", os.environ.get("DS_BUILD_OPS", "0"))
        return os.environ.get(self.build_variable, everything) == "1"


def op_specs() -> list[OpSpec]:
    """Every extension there is."""
    return [
        OpSpec("ta_cpu", "cpu", "cpu", operators=ROW_OPERATORS + PLAN_OPERATORS + BUCKET_OPERATORS + TARGET_OPERATORS),
        OpSpec("ta_rows", "rows", "cuda", operators=ROW_OPERATORS),
        OpSpec("ta_plan", "plan", "cuda", operators=PLAN_OPERATORS + BUCKET_OPERATORS),
        OpSpec("ta_weighted_attention", "weighted_attention", "cuda", architectures=("90a",)),
        OpSpec(
            "ta_target_attention", "target_attention", "cuda", operators=TARGET_OPERATORS, architectures=("80", "90a")
        ),
    ]


def spec_of(name: str) -> OpSpec:
    """The extension called `name`. Raises ValueError naming those there are."""
    for spec in op_specs():
        if spec.name == name:
            return spec
    raise ValueError(f"name is {name!r}; choose one of {[spec.name for spec in op_specs()]}")


def source_root() -> Path:
    """csrc/ beside the package in a checkout, inside it where it was installed."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"
