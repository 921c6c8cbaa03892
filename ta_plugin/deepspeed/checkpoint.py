"""Sharded rows in the engine's checkpoints, by torch.distributed.checkpoint: they load on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn

from ta_plugin.embedding import ShardedTokenEmbedding

FOLDER = "tokenized_attention"  # beside the engine's own files, inside the folder of a tag


class TableCheckpoints:
    """Makes `save_checkpoint` and `load_checkpoint` of one engine include its tables, row optimizer state too.

    The engine's own files hold no rows: each rank has others, and the engine writes what one rank has.
    """

    def __init__(self, engine: Any, tables: dict[str, ShardedTokenEmbedding]) -> None:
        self._engine, self._tables = engine, tables
        self._save, self._load = engine.save_checkpoint, engine.load_checkpoint
        engine.save_checkpoint = self.save
        engine.load_checkpoint = self.load
        engine.save_16bit_model = self._without(engine.save_16bit_model)

    def save(self, save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the engine's. Rows are written first, so that "latest" never names a checkpoint without them. Collective."""
        if not save_dir:
            raise ValueError(f"save_dir is {save_dir!r}; pass the path of a folder")
        tag = f"global_step{self._engine.global_steps}" if tag is None else str(tag)
        dcp.save(self._state(), checkpoint_id=str(Path(save_dir) / tag / FOLDER))
        with self._rows_left_out():
            return self._save(save_dir, tag, *args, **kwargs)

    def load(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str | None, Any]:
        """As the engine's. Raises FileNotFoundError for a checkpoint that holds no rows. Collective."""
        with self._rows_left_out():
            path, client_state = self._load(
                load_dir,
                tag,
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )
        if path is None:
            return path, client_state
        rows = Path(path if Path(path).is_dir() else Path(path).parent) / FOLDER
        if not rows.is_dir():
            raise FileNotFoundError(
                f"{rows.parent} holds no sharded rows: it was saved without the tokenized_attention block, or by another model, or it is "
                f"a universal checkpoint (copy the folder {FOLDER} from the checkpoint that it was converted from)"
            )
        state = self._state()
        if load_module_only or not load_optimizer_states:
            state = {name: {"weight": table["weight"]} for name, table in state.items()}
        dcp.load(state, checkpoint_id=str(rows))  # in place: the tensors are views of the tables'
        for name, table in self._tables.items():
            table.load_state_dict(state[name], strict=False)
        return path, client_state

    def _state(self) -> dict[str, dict[str, Any]]:
        return {name: table.state_dict() for name, table in self._tables.items()}

    def _without(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def without_rows(*args: Any, **kwargs: Any) -> Any:
            with self._rows_left_out():
                return method(*args, **kwargs)

        return without_rows

    @contextmanager
    def _rows_left_out(self) -> Iterator[None]:
        """While the engine reads or fills the model's state dict, tables have no entry in it."""
        tables = self._tables.values()
        handles = [table.register_state_dict_post_hook(_drop_entries) for table in tables]
        for table in tables:
            vars(table)["_load_from_state_dict"] = _load_nothing
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for table in tables:
                del vars(table)["_load_from_state_dict"]


def _drop_entries(table: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in list(state_dict):
        if name.startswith(prefix):  # the table has no children: all of these are its own
            del state_dict[name]


def _load_nothing(*args: Any) -> None:
    """A table's part in loading the model's state dict: nothing read, nothing missing."""
