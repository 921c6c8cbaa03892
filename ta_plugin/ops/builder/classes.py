"""Builders on DeepSpeed's classes. Importing this module imports DeepSpeed: do it inside functions."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from ta_plugin.ops.builder.specs import OpSpec, source_root
from ta_plugin.ops.builder.toolkit import cuda_toolkit, cuda_wheel_headers, missing_toolkit


class _Builder(OpBuilder):
    """What both kinds share: our paths, and an ahead-of-time module that DeepSpeed's own list of installed ops need not know."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__(name=spec.name)
        self.spec = spec

    @property
    def BUILD_VAR(self) -> str:
        return self.spec.build_variable

    def absolute_name(self) -> str:
        return self.spec.module

    def sources(self) -> list[str]:
        return [str(path) for path in self.spec.sources()]

    def include_paths(self) -> list[str]:
        return sorted({str(path.parent) for path in self.spec.sources()})

    def extra_ldflags(self) -> list[str]:
        return []

    def libraries_args(self) -> list[str]:
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether it can be built here; `error_log` says what is missing and how to get it."""
        self.error_log = missing_for(self.spec)
        return self.error_log is None

    def load(self, verbose: bool = False) -> Any:
        """The extension: built ahead of time, or just in time."""
        try:
            return importlib.import_module(self.absolute_name())
        except ModuleNotFoundError as error:
            if error.name != self.absolute_name():  # something it imports is missing, not the extension itself
                raise
        with _cache_per_torch_version():
            return self.jit_load(verbose)

    def extension(self, root: Path) -> Any:
        """For setup.py: as `builder()`, with sources relative to `root` as setuptools wants them."""
        built = self.builder()
        built.sources = [os.path.relpath(source, root) for source in built.sources]
        return built


class CPUBuilder(_Builder, CPUOpBuilder):
    """An extension of C++ sources."""

    def cxx_args(self) -> list[str]:
        args = [*super().cxx_args(), "-std=c++20"]
        if self.jit_mode:
            return args
        # wheels run on other machines, and need no debug information (nine tenths of the file)
        kept = [arg for arg in args if not arg.startswith(("-march", "-mcpu", "-D__AVX")) and arg != "-g"]
        return [*kept, "-g0"]


class CUDABuilder(_Builder, CUDAOpBuilder):
    """An extension of C++ and CUDA sources, for the architectures of its spec."""

    def cxx_args(self) -> list[str]:
        return ["-O3", "-std=c++20", "-g0"]

    def include_paths(self) -> list[str]:
        # torch takes the folder above the first nvcc on the path for the toolkit, which a wrapper script makes wrong
        toolkit = cuda_toolkit()
        found = [] if toolkit is None else [toolkit / "include"]
        return [*super().include_paths(), *map(str, [*found, *cuda_wheel_headers()])]

    def extra_ldflags(self) -> list[str]:
        toolkit = cuda_toolkit()
        folders = [] if toolkit is None else [toolkit / name for name in ("lib64", "lib")]
        return [f"-L{folder}" for folder in folders if folder.is_dir()]

    def nvcc_args(self) -> list[str]:
        # DeepSpeed's parser of architecture lists takes no "9.0a", and has no defaults for CUDA 13
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self._architectures()]
        return ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *codes]

    def _architectures(self) -> tuple[str, ...]:
        """TA_CUDA_ARCHITECTURES ("90a;100") of those in the spec; just in time, the one of the GPU here; otherwise all."""
        known = self.spec.architectures
        wanted = os.environ.get("TA_CUDA_ARCHITECTURES")
        if wanted is not None:
            chosen = tuple(a for a in known if a in wanted.split(";"))
            if not chosen:
                raise RuntimeError(
                    f"TA_CUDA_ARCHITECTURES is {wanted!r}; {self.spec.name} builds for {';'.join(known)}"
                )
            return chosen
        if not self.jit_mode or not torch.cuda.is_available():
            return known
        here = "{}{}".format(*torch.cuda.get_device_capability())
        return tuple(a for a in known if a.rstrip("a") == here) or known

    def jit_load(self, verbose: bool = True) -> Any:
        with _environment("TORCH_CUDA_ARCH_LIST", torch_architectures(self.spec)):
            return super().jit_load(verbose)

    def extension(self, root: Path) -> Any:
        # DeepSpeed refuses any minor version but torch's own; CUDA links within a major one, which `missing_for` has checked
        with _environment("DS_SKIP_CUDA_CHECK", "1"):
            return super().extension(root)


def builder_of(spec: OpSpec) -> CPUBuilder | CUDABuilder:
    """The builder of an extension."""
    return CPUBuilder(spec) if spec.device == "cpu" else CUDABuilder(spec)


def missing_for(spec: OpSpec) -> str | None:
    """What keeps an extension from being built here and how to change that, or None."""
    sources = spec.sources()
    if not sources:
        return f"{source_root() / spec.folder} holds no sources; install ta_plugin again"
    if not any(path.suffix == ".cpp" for path in sources):
        return f"csrc/{spec.folder} has kernels but no binding to torch yet"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r} is not on the path; install g++ or set CXX"
    if shutil.which("ninja") is None:
        try:
            importlib.import_module("ninja")
        except ModuleNotFoundError:
            return "ninja is not installed; pip install ninja"
    if spec.device == "cpu":
        return None
    if torch.version.cuda is None:
        nvcc = shutil.which("nvcc")
        seen = f" ({nvcc} is there: it can check the kernels, but nothing links against this torch)" if nvcc else ""
        return f"torch {torch.__version__} is built without CUDA{seen}; install a CUDA build of torch"
    return missing_toolkit()


def torch_architectures(spec: OpSpec) -> str:
    """The spec's architectures as TORCH_CUDA_ARCH_LIST writes them without letters: torch only needs a valid list."""
    numbers = [a.rstrip("abcdefghijklmnopqrstuvwxyz") for a in spec.architectures]
    return ";".join(f"{n[:-1]}.{n[-1]}" for n in numbers)


def _cache_per_torch_version() -> Any:
    """torch keys its cache of extensions by Python and CUDA only: another torch would load the wrong binary."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return _environment("TORCH_EXTENSIONS_DIR", os.environ["TORCH_EXTENSIONS_DIR"])
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return _environment("TORCH_EXTENSIONS_DIR", str(root / "ta_plugin" / f"torch-{torch.__version__}"))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
