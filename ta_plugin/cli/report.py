"""`ta-plugin report`: hosts, ops, backends and groups, as they are on this machine; like `ds_report`, for ours."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ta_plugin.attention.backends import BACKENDS, choose
from ta_plugin.ops.builder import OpSpec, missing_extension, op_specs
from ta_plugin.ops.builder.toolkit import cuda_toolkit, missing_toolkit, toolkit_version

SUPPORTED = {  # distribution: (lowest, below); what the tests ran against, torch 2.14 without the hosts
    "torch": ("2.11", "2.15"),
    "deepspeed": ("0.19.8", "0.20"),
    "megatron-core": ("0.16.1", "0.20"),
}


@dataclass(frozen=True)
class Line:
    """One fact: of what, its state ("ok", "missing", "warning") and the details."""

    section: str
    name: str
    state: str
    detail: str


def report(
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    size: Annotated[int | None, typer.Option(help="Ranks per SSP group, for the layout under torchrun.")] = None,
) -> None:
    """Versions of the hosts, which ops are built or can be, which attention backend would be chosen, and the group layout."""
    with redirect_stdout(sys.stderr):  # DeepSpeed's logger, which its op builders load, writes there
        lines = [*hosts(), *devices(), *ops(), *backends(), *layout(size)]
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
        return
    console = Console(width=None if Console().is_terminal else 160)
    colours = {"ok": "green", "missing": "dim", "warning": "yellow"}
    for section in dict.fromkeys(line.section for line in lines):
        table = Table(title=section, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for line in lines:
            if line.section == section:
                table.add_row(line.name, f"[{colours[line.state]}]{line.state}[/]", escape(line.detail))
        console.print(table)
        console.print()


def hosts() -> list[Line]:
    """Installed versions beside the range supported."""
    lines = []
    for name, (lowest, below) in SUPPORTED.items():
        wanted = f"supported: {lowest} up to, not including, {below}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines.append(Line("Hosts", name, "missing", f"not installed; {wanted}"))
            continue
        inside = _numbers(lowest) <= _numbers(version) < _numbers(below)
        lines.append(Line("Hosts", name, "ok" if inside else "warning", f"{version}; {wanted}"))
    return lines


def devices() -> list[Line]:
    """Compilers, CUDA and GPUs."""
    compiler = os.environ.get("CXX", "c++")
    lines = [_tool("C++ compiler", compiler), _tool("ninja", "ninja", find_spec("ninja") is not None)]
    toolkit = cuda_toolkit()
    if toolkit is None:
        lines.append(Line("Devices", "nvcc", "missing", str(missing_toolkit())))
    else:
        lines.append(Line("Devices", "nvcc", "ok", f"{toolkit_version(toolkit)}, in {toolkit}"))
    if torch.version.cuda is None:
        lines.append(Line("Devices", "CUDA in torch", "missing", f"torch {torch.__version__} is built without it"))
    else:
        lines.append(Line("Devices", "CUDA in torch", "ok", torch.version.cuda))
    if not torch.cuda.is_available():
        lines.append(Line("Devices", "GPU", "missing", "none that torch can use"))
    else:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            detail = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
            lines.append(Line("Devices", f"GPU {index}", "ok", detail))
    return lines


def ops() -> list[Line]:
    """Which extensions are built ahead of time, or can be built on first use, or why not."""
    return [_op(spec) for spec in op_specs()]


def backends() -> list[Line]:
    """Which backends run a plain call on this machine's device, and the one that would be chosen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lines = []
    for head_dim in (64, 128):
        choice = _choose(None, device, dtype, head_dim)
        lines.append(Line("Attention", f"{device.type}, {dtype}, head_dim {head_dim}", "ok", choice))
    for name in BACKENDS:
        try:
            _choose(name, device, dtype, 64)
            lines.append(Line("Attention", f"backend {name}", "ok", f"runs on {device.type}"))
        except ValueError as error:
            lines.append(Line("Attention", f"backend {name}", "missing", str(error).split(";")[0]))
    return lines


def layout(size: int | None) -> list[Line]:
    """SSP groups over the ranks of torchrun; nothing outside it."""
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if "RANK" not in os.environ or world < 1:
        return [Line("Groups", "layout", "missing", "not launched by torchrun: no ranks to divide")]
    size = world if size is None else size
    if size < 1 or world % size:
        sizes = [s for s in range(1, world + 1) if world % s == 0]
        return [
            Line("Groups", "layout", "warning", f"--size {size} does not divide {world} ranks; choose one of {sizes}")
        ]
    lines = [
        Line(
            "Groups", "SSP", "ok", f"{world // size} group(s) of {size} rank(s), {world // size} replica(s) of each row"
        )
    ]
    for first in range(0, world, size):
        lines.append(Line("Groups", f"group {first // size}", "ok", f"ranks {first} to {first + size - 1}"))
    return lines


def _op(spec: OpSpec) -> Line:
    runs = "" if spec.device == "cpu" else _where_it_runs(spec)
    state = "warning" if "but" in runs else "ok"
    missing = missing_extension(spec)
    if missing is not None:
        return Line("Ops", spec.name, "missing", missing)
    if _importable(spec.module):
        return Line("Ops", spec.name, state, f"built ahead of time{runs}")
    when = "torch runs until ta_plugin.ops.load_op builds it" if spec.device == "cpu" else "builds on first use"
    return Line("Ops", spec.name, state, f"not built yet; {when}{runs}")


def _where_it_runs(spec: OpSpec) -> str:
    codes = ", ".join(f"sm_{architecture}" for architecture in spec.architectures)
    if not torch.cuda.is_available():
        return f", for {codes} (no GPU here to run it)"
    major, minor = torch.cuda.get_device_capability()
    # sm_90a runs on 9.0 alone, sm_80 on every 8.x
    exact, family = f"{major}{minor}a", f"{major}0"
    runs = exact in spec.architectures or family in spec.architectures
    return f", for {codes}" if runs else f", for {codes}, but this GPU is sm_{major}{minor}"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _choose(name: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    choice = choose(
        name,
        device=device,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=head_dim,
    )
    return f"{choice.name} ({choice.reason.split(';')[0]})"  # why not the others stands in their own lines


def _tool(label: str, command: str, found: bool = False) -> Line:
    path = shutil.which(command)
    if path is None and not found:
        return Line("Devices", label, "missing", f"{command!r} is not on the path")
    return Line("Devices", label, "ok", path or "installed as a Python package")


def _numbers(version: str) -> tuple[int, ...]:
    release = version.split("+")[0].split("rc")[0].split("b")[0].split("a")[0]
    return tuple(int(part) for part in release.split(".") if part.isdigit())
