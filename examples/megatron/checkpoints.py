"""Checkpoints of core_loop.py: iterations below one folder, and a file that names the newest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist


class Resumable(Protocol):
    """A training step that writes its state into a folder, and reads it back."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


def save(folder: Path, step: Resumable, iteration: int) -> None:
    """A kill leaves the checkpoint before or this one. Collective."""
    target = folder / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)  # of a run that died while it saved
        target.mkdir(parents=True)
    dist.barrier()
    step.save(target)
    dist.barrier()
    if dist.get_rank() == 0:
        pending = folder / "latest.tmp"
        pending.write_text(target.name)
        pending.replace(folder / "latest")
        for old in folder.glob("iter_*"):
            if old != target:
                shutil.rmtree(old)


def load(folder: Path, step: Resumable) -> int:
    """Load the newest checkpoint; the iterations done. Collective. Raises ValueError where there is none."""
    latest = folder / "latest"
    if not latest.exists():
        raise ValueError(f"--load is {folder}, which holds no checkpoint; pass the folder that --save was given")
    target = folder / latest.read_text()
    step.load(target)
    return int(target.name.removeprefix("iter_"))


def save_rank(folder: Path, **state: object) -> None:
    """This rank's part, for as many ranks again."""
    torch.save({"world": dist.get_world_size(), **state}, folder / f"rank_{dist.get_rank()}.pt")


def load_rank(folder: Path) -> dict[str, object]:
    """What `save_rank` wrote. Raises ValueError for another number of ranks."""
    saved = len(list(folder.glob("rank_*.pt")))
    if saved == 0:
        raise ValueError(
            f"--load is {folder.parent}, which was not written by CPU processes; load it on GPUs, as it was written"
        )
    if saved != dist.get_world_size():
        raise ValueError(
            f"--load is {folder.parent}, written by {saved} CPU processes; start {saved}, not {dist.get_world_size()} "
            "(on GPUs Megatron's checkpoints load into other layouts)"
        )
    return torch.load(folder / f"rank_{dist.get_rank()}.pt")
