"""The recommender: distinct rows all the way, tokenized equal to plain, resuming bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_interactions import write_interactions
from torch import nn

from ta_plugin import SSPGroup, UniqueSpace, create_ssp_group
from ta_plugin.data.interactions import load_interactions
from ta_plugin.models.compare import compare
from ta_plugin.models.recommender import RecommenderConfig, SequenceRecommender, last_events
from ta_plugin.models.trainer import RecommenderTrainer, train
from ta_plugin.parallel import average_gradients


@pytest.fixture
def inter(tmp_path: Path) -> Path:
    return write_interactions(tmp_path / "small.inter")


def trainer_for(path: str, group: SSPGroup | None = None, learning_rate: float = 2e-3) -> RecommenderTrainer:
    data = load_interactions(Path(path))
    config = RecommenderConfig(
        vocab_size=data.n_items,
        num_actions=data.n_actions,
        batch_size=6,
        recent_length=5,
        long_length=12,
        dim=8,
        num_layers=2,
    )
    return RecommenderTrainer(
        data, config, tokens_are_items=True, num_negatives=4, learning_rate=learning_rate, group=group
    )


def test_norm_attention_and_mlp_run_on_distinct_rows(inter: Path) -> None:
    trainer = trainer_for(str(inter))
    batch = trainer.batch(0)
    tokens, lengths = last_events(batch.tokens, lengths=batch.lengths, width=5)
    space = UniqueSpace.from_padded(tokens, lengths)
    assert space.num_rows < space.num_occurrences, "the data must repeat tokens for this test to say anything"
    rows_seen: dict[str, int] = {}
    for name, module in trainer.model.encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda m, args, out, name=name: rows_seen.update({name: out.shape[0]}) if out.dim() == 2 else None
            )
    trainer.loss(batch, 1.0)
    acted = {name: rows for name, rows in rows_seen.items() if "recency" not in name and "action" not in name}
    assert len(acted) >= 2 * 6 + 1  # two norms, qkv, out and the MLP's parts of each layer, and the last norm
    assert set(acted.values()) == {space.num_rows}


def check_tokenized_equals_plain(path: str) -> None:
    group = SSPGroup(dist.group.WORLD) if dist.is_initialized() else None
    trainer = trainer_for(path, group)
    trainer.model.double()
    trainer.table.double()
    with torch.no_grad():  # side inputs start at zero; give them something to do
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    plain = SequenceRecommender(
        replace(trainer.config, strategy="positions"), trainer.table, group=trainer.group, nranks=trainer.group.size
    ).double()
    plain.load_state_dict(trainer.model.state_dict())
    batch = trainer.batch(1)
    ages = batch.ages.double()
    results = []
    for model in (trainer.model, plain):
        logits = model(batch.tokens, batch.lengths, ages, batch.actions, batch.targets)
        logits.sin().sum().backward()
        average_gradients(model.parameters(), trainer.group)  # in strategy owner a rank computes for the others
        trainer.table.reduce_gradients()
        rows, grads = trainer.table._reduced or (None, None)
        order = rows.argsort()
        dense = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits, rows[order], grads[order], dense))
        trainer.table.zero_grad()
    (ours, rows, grads, dense), (theirs, their_rows, their_grads, their_dense) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert torch.equal(rows, their_rows)
    torch.testing.assert_close(grads, their_grads, rtol=0, atol=1e-10)
    torch.testing.assert_close(dense, their_dense, rtol=0, atol=1e-9)


def test_tokenized_equals_plain_on_one_rank(inter: Path) -> None:
    check_tokenized_equals_plain(str(inter))


@pytest.mark.parametrize("ranks", [2, 4])
def test_tokenized_equals_plain_on_ranks(rank_pools: Any, inter: Path, ranks: int) -> None:
    rank_pools(ranks).run(check_tokenized_equals_plain, str(inter))


class StopAfter:
    """Asks to stop so that update `last` is the last one."""

    def __init__(self, last: int | None) -> None:
        self.last, self.done = last, 0

    def requested(self) -> bool:
        return self.last is not None and self.done + 1 >= self.last

    def on_step(self, step: int, row: dict[str, Any]) -> None:
        self.done = step


def run_training(
    path: str, folder: str, stops: list[int], steps: int
) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    """Train to `steps`, beginning anew after each of `stops` as a resumed process would."""
    for number, last in enumerate([*stops, None]):
        trainer, stop = trainer_for(path, SSPGroup(dist.group.WORLD)), StopAfter(last)
        log, finished = train(
            trainer, steps, Path(folder), resume=number > 0, evaluate_every=4, save_every=1000,
            stop_requested=stop.requested, on_step=stop.on_step,
        )  # fmt: skip
        assert finished == (last is None)
    return [row["loss"] for row in log], trainer.model.state_dict(), trainer.table.to_dense()


def test_stopping_and_resuming_loses_nothing(rank_pools: Any, inter: Path, tmp_path: Path) -> None:
    whole = rank_pools(2).run(run_training, str(inter), str(tmp_path / "whole"), [], 6)
    parts = rank_pools(2).run(run_training, str(inter), str(tmp_path / "parts"), [2, 5], 6)
    for (losses, model, table), (losses_again, model_again, table_again) in zip(whole, parts, strict=True):
        assert len(losses) == 6 and losses == losses_again
        assert all(torch.equal(model[name], model_again[name]) for name in model)
        assert torch.equal(table, table_again)
    assert [p.name for p in (tmp_path / "parts").glob("step_*")] == ["step_00000006"]


def trained_in_groups(path: str, folder: str, size: int) -> tuple[list[float], bool, int, float]:
    """Losses, whether training finished though rank 1 alone asked to stop at update 4, updates done, and tokens per second."""
    trainer, stop = trainer_for(path, create_ssp_group(size)), StopAfter(4 if dist.get_rank() == 1 else None)
    log, finished = train(
        trainer, 6, Path(folder), resume=False, evaluate_every=100, save_every=1000,
        stop_requested=stop.requested, on_step=stop.on_step,
    )  # fmt: skip
    return [row["loss"] for row in log], finished, stop.done, compare(trainer, 1).tokenized.tokens_per_second


def test_replicas_train_together(rank_pools: Any, inter: Path, tmp_path: Path) -> None:
    """SSP groups smaller than the world: the same losses, one end, and one count."""
    together, apart = (rank_pools(4).run(trained_in_groups, str(inter), str(tmp_path / str(n)), n) for n in (4, 2))
    for one, other in zip(together, apart, strict=True):
        assert other[0] == pytest.approx(one[0], rel=1e-4) and len(one[0]) == 4
        assert one[1:3] == other[1:3] == (False, 4)
    assert len({each[3] for each in apart}) == 1


def test_training_learns_and_compares(inter: Path) -> None:
    trainer = trainer_for(str(inter), learning_rate=0.02)
    before = trainer.evaluate("valid")
    losses = [trainer.train_step(step)[0] for step in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert trainer.evaluate("valid")["auc"] > before["auc"] + 0.1
    found = compare(trainer, steps=2)
    assert found.largest_difference < 1e-4 * max(found.largest_logit, 1.0)
    assert found.occurrences_per_row > 1.2
    assert found.tokenized.tokens_per_second > 0


def test_last_events_keeps_the_newest() -> None:
    grid = torch.arange(12).view(2, 6)
    kept, lengths = last_events(grid, lengths=torch.tensor([5, 2]), width=3)
    assert kept[0].tolist() == [2, 3, 4] and kept[1, :2].tolist() == [6, 7]
    assert lengths.tolist() == [3, 2]


def test_the_recent_branch_takes_a_backend() -> None:
    model = SequenceRecommender(
        RecommenderConfig(vocab_size=20, num_actions=2, batch_size=2, backend="reference"), nn.Embedding(20, 64)
    )
    assert model.recent.scoring.backend == "reference" and model.long.scoring.backend is None
