"""Folders that look like a CUDA toolkit, for tests of what is found where."""

from __future__ import annotations

from pathlib import Path


def tool(path: Path, line: str = "") -> None:
    """An executable that runs one line of shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def cuda_of_version(home: Path, version: str) -> Path:
    """`home`, with an nvcc that says it is of `version` and a header beside it."""
    tool(home / "bin" / "nvcc", f"echo Cuda compilation tools, release {version}, V{version}.88")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home
