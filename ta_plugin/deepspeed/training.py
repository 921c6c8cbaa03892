"""Sharded rows that train with the engine: its step is theirs, its clipping, loss scale and skipped steps too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ta_plugin.deepspeed.groups import gradient_divisor
from ta_plugin.deepspeed.norms import join_norm
from ta_plugin.embedding import ShardedTokenEmbedding
from ta_plugin.parallel import SSPGroup


class TableTraining:
    """Steps the tables of one engine whenever that engine updates its model.

    Rows train outside the engine's optimizer, the same at every ZeRO stage: backward records their gradients over the
    micro-batches, and the engine's one update method, replaced on this instance only, reduces and applies them.

    following: tables whose learning rate is the engine's at each step
    """

    def __init__(
        self,
        engine: Any,
        tables: list[ShardedTokenEmbedding],
        group: SSPGroup,
        following: list[ShardedTokenEmbedding],
    ) -> None:
        self._engine, self._tables, self._group, self._following = engine, tables, group, following
        self._row_norm = torch.zeros(())
        self._total_norm: Callable[[], float] = join_norm(engine, lambda: self._row_norm)
        self._update = engine._take_model_step
        engine._take_model_step = self.take_step
        self._forget, self._updating = engine.zero_grad, False
        engine.zero_grad = self.zero_grad
        self._make_replicas_equal()
        self._match_dtype()

    def take_step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """The engine's update, then the same one for the rows: clipped by the same norm, or skipped with it. Collective."""
        engine = self._engine
        loss_scale = self._loss_scale()  # an overflow changes it during the update
        rate = float(engine.get_lr()[0]) if self._following else 0.0
        # the table divides by all data-parallel ranks; the engine may divide by something else
        factor = self._group.data_parallel_size / gradient_divisor(engine)
        self._row_norm = factor * self._norm()
        self._updating = True  # which ends in zero_grad at some stages; the rows' step is still to come
        try:
            self._update(lr_kwargs)
        finally:
            self._updating = False
        if not engine.was_step_applied():
            for table in self._tables:
                table.zero_grad()
            return
        for table in self._following:
            table.optimizer.lr = rate
        scale = factor / loss_scale * self._clip_coefficient()
        for table in self._tables:
            table.step(scale)

    def zero_grad(self) -> None:
        """The engine's, and the rows' recorded gradients with it."""
        self._forget()
        if not self._updating:
            for table in self._tables:
                table.zero_grad()

    def _norm(self) -> Tensor:
        """Norm of the rows' reduced gradient over all tables, of every pipeline stage. Collective."""
        squared = torch.zeros((), device=self._group.device)
        for table in self._tables:
            squared += table.grad_norm_squared()
        if self._engine.pipeline_parallelism:
            dist.all_reduce(squared, group=self._engine.mpu.get_pipe_parallel_group())
        return squared.sqrt()

    def _clip_coefficient(self) -> float:
        bound = self._engine.gradient_clipping()
        return min(1.0, bound / (self._total_norm() + 1e-6)) if bound > 0.0 else 1.0

    def _loss_scale(self) -> float:
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "loss_scale_config"):
            return float(optimizer.loss_scale_config.cur_scale)
        return float(getattr(optimizer, "loss_scale", 1.0))

    def _make_replicas_equal(self) -> None:
        """As DeepSpeed broadcasts parameters: rows drawn differently on two replicas would stay different."""
        replicas = self._group.replicas
        if replicas is None:
            return
        source = dist.get_process_group_ranks(replicas)[0]
        for table in self._tables:
            for tensor in (table.rows, *table.state.values()):
                dist.broadcast(tensor, source, group=replicas)

    def _match_dtype(self) -> None:
        """Rows stay in their own precision, their master copy; what leaves the table is in the engine's, and nothing reads it in place."""
        dtype = self._engine.get_data_types()[0]
        for table in self._tables:
            if dtype not in (torch.float32, table.rows.dtype):
                table.register_forward_hook(lambda module, inputs, rows: rows.to(dtype))
                table.in_place = None  # type: ignore[assignment, method-assign]
