"""The CUDA toolkit of this machine: where it is, its version, and whether this torch links with it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch


def cuda_toolkit() -> Path | None:
    """Folder of the CUDA toolkit: CUDA_HOME where it is set, else where the nvcc on the path really lies, or the usual place."""
    home, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    places = [Path("/usr/local/cuda")] if nvcc is None else [Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    for place in places if home is None else [Path(home)]:
        if (place / "bin" / "nvcc").is_file() and (place / "include" / "cuda_runtime.h").is_file():
            return place
    return None


def toolkit_version(toolkit: Path) -> str | None:
    """What its nvcc says, such as "13.0"; None when it says nothing of the kind."""
    said = subprocess.run([toolkit / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return None if found is None else found[1]


def missing_toolkit() -> str | None:
    """What keeps CUDA sources from being compiled and linked with this torch, and how to change that, or None."""
    toolkit = cuda_toolkit()
    if toolkit is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = (
            "nvcc is not on the path"
            if home is None
            else f"CUDA_HOME is {home!r}, which holds no nvcc with its headers"
        )
        return f"{where}; install the CUDA toolkit or set CUDA_HOME to its folder"
    version, needed = toolkit_version(toolkit), torch.version.cuda
    if version is None:
        return f"{toolkit / 'bin' / 'nvcc'} does not tell its version; repair the CUDA toolkit there"
    if needed is not None and version.split(".")[0] != needed.split(".")[0]:  # minor versions link with each other
        major = needed.split(".")[0]
        return f"nvcc in {toolkit} is of CUDA {version}, torch of {needed}; set CUDA_HOME to a toolkit of CUDA {major}"
    return None


def cuda_wheel_headers() -> list[Path]:
    """Headers that came with torch's wheel; a toolkit without its libraries lacks cusparse.h and the like."""
    found, major = importlib.util.find_spec("nvidia"), (torch.version.cuda or "").split(".")[0]
    roots = [] if found is None else found.submodule_search_locations or []
    return [place for root in roots if (place := Path(root) / f"cu{major}" / "include").is_dir()]
