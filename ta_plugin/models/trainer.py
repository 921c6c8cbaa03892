"""Training a SequenceRecommender over an SSP group: one step, evaluation over all items, checkpoints that resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ta_plugin.data.batches import Batch, Histories, HistoryBatches, Part
from ta_plugin.data.interactions import Interactions
from ta_plugin.embedding import ShardedTokenEmbedding
from ta_plugin.models.metrics import candidate_counts, mean_metrics, positive_ranks, ranking_metrics
from ta_plugin.models.recommender import RecommenderConfig, SequenceRecommender, sampled_softmax_loss
from ta_plugin.parallel import SSPGroup, average_gradients, exchange_header
from ta_plugin.row_optimizers import LazyAdam


class RecommenderTrainer:
    """Model, table and optimizers of one run.

    Ids of the table: 0 .. n_items - 1 are items; where the history's tokens are something else, they follow at n_items.
    """

    def __init__(
        self,
        interactions: Interactions,
        config: RecommenderConfig,
        *,
        tokens_are_items: bool,
        num_negatives: int = 63,
        learning_rate: float = 2e-3,
        seed: int = 0,
        group: SSPGroup | None = None,
    ) -> None:
        self.group = group or SSPGroup(None)
        self.interactions, self.config = interactions, config
        self.tokens_are_items = tokens_are_items
        torch.manual_seed(seed)  # dense parameters start equal on every rank
        device = self.group.device
        self.table = ShardedTokenEmbedding(
            config.vocab_size, config.dim, self.group, optimizer=LazyAdam(learning_rate), seed=seed, device=device
        )
        self.model = SequenceRecommender(config, self.table, group=self.group, nranks=self.group.size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        world = self.group.data_parallel_size
        # the SSP ranks and their replicas: who trains together
        self.everybody = self.group if world == 1 else SSPGroup(dist.group.WORLD, device=device)
        self.batches = HistoryBatches(
            interactions,
            batch_size=config.batch_size,
            sequence_length=config.long_length,
            n_negatives=num_negatives,
            rank=dist.get_rank() if world > 1 else 0,
            world_size=world,
            seed=seed,
            min_history=1,
        )

    def batch(self, step: int) -> Batch:
        """The batch of a global step, counted through epochs, on the training device."""
        epoch, within = divmod(step, self.batches.steps_per_epoch)
        return self.batches.batch(epoch, within).to(self.group.device)

    def loss(self, batch: Batch, total_weight: float) -> Tensor:
        """This rank's loss; the mean over ranks is the mean over their samples, `total_weight` in all."""
        logits = self.model(self.tokens_of(batch), batch.lengths, batch.ages, batch.actions, batch.targets)
        return sampled_softmax_loss(logits, batch.weights, total_weight, self.group.data_parallel_size)

    def train_step(self, step: int, stop: bool = False) -> tuple[float, bool]:
        """One update. Returns the mean loss over all ranks of the *previous forward*, and whether any rank asked to stop."""
        batch = self.batch(step)
        announced = exchange_header(self.everybody, [int(stop), int(batch.weights.sum())])
        loss = self.loss(batch, float(max(1, sum(weight for _, weight in announced))))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.model.parameters(), self.group)
        self.optimizer.step()
        self.table.step()
        return self._mean(loss.detach()), any(asked for asked, _ in announced)

    @torch.no_grad()
    def evaluate(self, part: Part) -> dict[str, float]:
        """AUC, HR@10, NDCG@10 of the held-out event among all items not seen before, over all users. Collective."""
        n_items = self.interactions.n_items
        items = self.model.long.embed(torch.arange(n_items, device=self.group.device)[None])
        items = items.expand(self.config.batch_size, -1, -1)
        sums: dict[str, Tensor] = {}
        for step in range(self.batches.evaluation_steps(part)):
            batch = self.batches.evaluation_batch(part, step).to(self.group.device)
            scores = self.model.score(self.tokens_of(batch), batch.lengths, batch.ages, batch.actions, items)
            seen = batch.seen_mask(n_items)
            ranks = positive_ranks(scores, batch.positive, seen)
            found = ranking_metrics(ranks, candidate_counts(batch.positive, seen), weights=batch.weights)
            sums = {name: value + sums.get(name, 0.0) for name, value in found.items()}
        if dist.is_initialized():
            for value in sums.values():
                dist.all_reduce(value)
        return mean_metrics(sums)

    def tokens_of(self, batch: Histories) -> Tensor:
        """The history's ids in the table (B, L)."""
        return batch.tokens if self.tokens_are_items else batch.tokens + self.interactions.n_items

    def save(self, folder: Path, step: int, log: list[dict[str, Any]]) -> None:
        """Save everything a resumed run needs after `step` updates; only the newest checkpoint stays. Collective."""
        target = folder / f"step_{step:08d}"
        # the log as text: a list would be taken apart into one entry per number
        dcp.save({**self._state(), "step": step, "log": json.dumps(log)}, checkpoint_id=str(target))
        if not dist.is_initialized() or dist.get_rank() == 0:
            pending = folder / "latest.tmp"
            pending.write_text(target.name)
            pending.replace(folder / "latest")  # atomic: a kill leaves the old checkpoint or the new one
            for old in folder.glob("step_*"):
                if old.name != target.name:
                    shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def load(self, folder: Path) -> tuple[int, list[dict[str, Any]]]:
        """Load the newest checkpoint, saved on any number of ranks: the updates done and the log; (0, []) without one."""
        latest = folder / "latest"
        if not latest.exists():
            return 0, []
        state: dict[str, Any] = {**self._state(), "step": 0, "log": ""}
        dcp.load(state, checkpoint_id=str(folder / latest.read_text()))
        self.model.load_state_dict(state["model"])
        self.table.load_state_dict(state["table"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        return state["step"], json.loads(state["log"])

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "table": self.table.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def _mean(self, value: Tensor) -> float:
        if self.group.data_parallel_size > 1:
            dist.all_reduce(value)
        return float(value) / self.group.data_parallel_size


def train(
    trainer: RecommenderTrainer,
    steps: int,
    folder: Path,
    *,
    resume: bool,
    evaluate_every: int,
    save_every: int,
    stop_requested: Callable[[], bool],
    on_step: Callable[[int, dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], bool]:
    """Train up to `steps` updates, from the newest checkpoint in `folder` with `resume`; returns the log and whether it finished.

    `on_step(step, row)` is called after every update with a row of the log: step, loss, and metrics where evaluated.
    """
    step, log = trainer.load(folder) if resume else (0, [])
    stop = False
    while step < steps and not stop:
        loss, stop = trainer.train_step(step, stop_requested())
        step += 1
        row: dict[str, Any] = {"step": step, "loss": loss}
        if step % evaluate_every == 0 or step == steps:
            row |= trainer.evaluate("valid")
        log.append(row)
        on_step(step, row)
        if step % save_every == 0 or step == steps or stop:
            trainer.save(folder, step, log)
    return log, step >= steps
