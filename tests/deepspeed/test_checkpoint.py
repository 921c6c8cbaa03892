"""Checkpoints hold the sharded rows: they load into another SSP size, and on another number of ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import (
    DENSE_RATE,
    PART,
    WORLD,
    Setup,
    build_engine,
    build_models,
    dense_optimizers,
    train_dense,
    train_engine,
)
from torch import nn

from ta_plugin import ShardedTokenEmbedding


def resumes(folder: str, setup: Setup, size: int) -> None:
    """Three steps, save, load into a fresh engine with another SSP size, two more: the dense model's five."""
    model, dense = build_models()
    engine = build_engine(model, setup)
    first = train_engine(engine, setup)
    engine.save_checkpoint(folder, client_state={"note": 5})
    engine.destroy()

    again = Setup(stage=setup.stage, size=size, steps=2, clip=setup.clip)
    model, _ = build_models()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.attention.embedding_fn.rows.zero_()
    engine = build_engine(model, again)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and client_state["note"] == 5
    assert int(model.attention.embedding_fn.steps) == setup.steps
    losses = first + train_engine(engine, again, first=setup.steps)

    whole = Setup(steps=setup.steps + 2, clip=setup.clip)
    expected = train_dense(dense, whole, world=dist.get_world_size())
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    engine.destroy()


@pytest.mark.parametrize("sizes", [(WORLD, PART), (1, WORLD), (PART, 1)], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumes_in_another_ssp_size(engines_on: Any, tmp_path: Path, stage: int, sizes: tuple[int, int]) -> None:
    engines_on(WORLD).run(resumes, str(tmp_path), Setup(stage=stage, size=sizes[0], steps=3, clip=0.3), sizes[1])


def save_after(folder: str, setup: Setup) -> list[float]:
    model, _ = build_models()
    engine = build_engine(model, setup)
    losses = train_engine(engine, setup)
    engine.save_checkpoint(folder, tag="here")
    engine.destroy()
    return losses


def goes_on(engine: Any, dense: nn.Module, setup: Setup, saved_on: int) -> None:
    """The next steps of an engine loaded after three are the dense model's."""
    optimizers = dense_optimizers(dense)
    train_dense(dense, Setup(steps=3), world=saved_on, optimizers=optimizers)
    expected = train_dense(dense, setup, dist.get_world_size(), first=3, optimizers=optimizers)
    torch.testing.assert_close(train_engine(engine, setup, first=3), expected, rtol=0, atol=1e-5)
    engine.destroy()


def continue_on_fewer(folder: str, setup: Setup, saved_on: int) -> None:
    model, dense = build_models()
    engine = build_engine(model, setup)
    engine.load_checkpoint(folder, tag="here")
    goes_on(engine, dense, setup, saved_on)


def test_resumes_on_another_number_of_ranks(engines_on: Any, tmp_path: Path) -> None:
    engines_on(4).run(save_after, str(tmp_path), Setup(size=4, steps=3))
    engines_on(2).run(continue_on_fewer, str(tmp_path), Setup(size=2, steps=2), 4)


def continue_from_universal(folder: str, setup: Setup, saved_on: int) -> None:
    model, dense = build_models()
    engine = build_engine(model, setup)
    with pytest.raises(FileNotFoundError, match="copy the folder tokenized_attention"):
        engine.load_checkpoint(folder, tag="universal")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(f"{folder}/here/tokenized_attention", f"{folder}/universal/tokenized_attention")
    dist.barrier()
    engine.load_checkpoint(folder, tag="universal")
    goes_on(engine, dense, setup, saved_on)


@pytest.mark.parametrize("stage", [1, 3])
def test_universal_checkpoints_resume_on_another_number_of_ranks(engines_on: Any, tmp_path: Path, stage: int) -> None:
    """ZeRO's own files belong to one number of ranks; DeepSpeed's converter frees them of it, and the rows never were bound."""
    engines_on(4).run(save_after, str(tmp_path), Setup(stage=stage, size=4, steps=3))
    convert = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--num_extract_workers",
        "1",
        "--inject_missing_state",
    ]
    convert += ["--num_merge_workers", "1", "--input_folder", str(tmp_path / "here")]
    done = subprocess.run([*convert, "--output_folder", str(tmp_path / "universal")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    again = Setup(stage=stage, size=2, steps=2, more={"checkpoint": {"load_universal": True}})
    engines_on(2).run(continue_from_universal, str(tmp_path), again, 4)


def engines_files_hold_no_rows(folder: str) -> None:
    model, _ = build_models()
    engine = build_engine(model, Setup(steps=1))
    rows = set(model.state_dict())
    engine.save_checkpoint(folder, tag="here")
    saved = torch.load(f"{folder}/here/mp_rank_00_model_states.pt", weights_only=False)
    assert set(saved["module"]) == rows - {name for name in rows if name.startswith("attention.embedding_fn")}
    assert set(model.state_dict()) == rows, "the model's own state dict has its rows again"
    engine.destroy()


def test_the_engines_own_files_hold_no_rows(engines_on: Any, tmp_path: Path) -> None:
    engines_on(2).run(engines_files_hold_no_rows, str(tmp_path))


def weights_only(folder: str) -> None:
    model, _ = build_models()
    engine = build_engine(model, Setup())
    train_engine(engine, Setup(steps=2))
    engine.save_checkpoint(folder)
    trained = model.attention.embedding_fn.to_dense()
    engine.destroy()
    model, _ = build_models()
    engine = build_engine(model, Setup())
    engine.load_checkpoint(folder, load_optimizer_states=False)
    table = model.attention.embedding_fn
    assert torch.equal(table.to_dense(), trained)
    assert not table.state["sum"].any() and int(table.steps) == 0
    engine.destroy()


def test_without_optimizer_states_only_rows_are_loaded(engines_on: Any, tmp_path: Path) -> None:
    engines_on(2).run(weights_only, str(tmp_path))


def without_rows(folder: str) -> None:
    import deepspeed

    plain = nn.Linear(3, 1)
    setup = Setup(size=None)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=DENSE_RATE)
    engine = deepspeed.initialize(model=plain, optimizer=optimizer, config=setup.config())[0]
    engine.save_checkpoint(folder)
    engine.destroy()
    model = nn.Linear(3, 1)
    model.table = ShardedTokenEmbedding(5, 3)
    engine = build_engine(model, Setup())
    with pytest.raises(FileNotFoundError, match="holds no sharded rows"):
        engine.load_checkpoint(folder)
    engine.destroy()


def test_a_checkpoint_without_rows_is_refused(engines_on: Any, tmp_path: Path) -> None:
    engines_on(2).run(without_rows, str(tmp_path))
