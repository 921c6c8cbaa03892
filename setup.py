"""Installs ta_plugin. TA_BUILD_OPS=1 compiles the operators of csrc/ ahead of time (pip install --no-build-isolation .);

DS_BUILD_<OP>=0 or 1 decides for one of them, for example DS_BUILD_TA_SEGMENTS_CPU=1. Otherwise they build on first use.
"""

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup


def compiled_ops() -> dict[str, Any]:
    """Arguments of setup() for the extensions that the environment asks for; nothing, and no import, without it."""
    if not any(name in os.environ for name in ("TA_BUILD_OPS", "DS_BUILD_OPS")) and not any(
        name.startswith("DS_BUILD_TA_") for name in os.environ
    ):
        return {}
    root = Path(__file__).resolve().parent
    sys.path.insert(0, str(root))
    from ta_plugin.ops.builder import op_specs

    wanted = [spec for spec in op_specs() if spec.wanted_ahead_of_time()]
    if not wanted:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    from ta_plugin.ops.builder.classes import builder_of, missing_for

    extensions = []
    for spec in wanted:
        missing = missing_for(spec)
        if missing is None:
            extensions.append(builder_of(spec).extension(root))
        elif os.environ.get(spec.build_variable) == "1":
            sys.exit(f"{spec.build_variable}=1, but {spec.name} cannot be built: {missing}")
        else:
            print(f"{spec.name} is left out: {missing}", file=sys.stderr)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="ta_plugin",
    version="0.1.0",
    description="Exact attention over distinct tokens, distributed, for Megatron-core and DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ta_plugin", "ta_plugin.*"]),
    package_data={"ta_plugin": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",  # torch.distributed.checkpoint and the data readers
        "rich>=13",  # progress bars and the tables that explain() and the examples print
        "typer>=0.12",  # the command line
    ],
    entry_points={"console_scripts": ["ta-plugin = ta_plugin.cli.main:app"]},
    extras_require={
        "megatron": ["megatron-core>=0.16.1"],
        "deepspeed": ["deepspeed>=0.19.8"],
        "examples": ["matplotlib>=3.8", "tokenizers>=0.20"],  # curves; byte-pair encoding of real text
        "test": ["pytest>=8", "transformers>=5", "hypothesis>=6.100", "ruff==0.14.5", "mypy==1.18.2"],
    },
    **compiled_ops(),
)
