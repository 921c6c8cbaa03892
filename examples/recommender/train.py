"""Train the sequence recommender on a RecBole `.inter` file, on as many processes as torchrun starts.

torchrun --nproc-per-node 2 examples/recommender/train.py --inter data/ml-100k/ml-100k.inter --item data/ml-100k/ml-100k.item
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from report import Outcome, Progress, print_outcomes, write_curves

from ta_plugin import create_ssp_group
from ta_plugin.data.batches import HistoryBatches, Part
from ta_plugin.data.interactions import Interactions, events_to_train, load_interactions
from ta_plugin.models.compare import compare
from ta_plugin.models.metrics import candidate_counts, mean_metrics, popularity_scores, positive_ranks, ranking_metrics
from ta_plugin.models.recommender import RecommenderConfig
from ta_plugin.models.stopping import StopFlag
from ta_plugin.models.trainer import RecommenderTrainer, train
from ta_plugin.parallel import SSPGroup


def main(
    inter: Annotated[Path, typer.Option(help="RecBole atomic file of interactions")],
    item: Annotated[
        Path | None, typer.Option(help="RecBole atomic file of items, for token columns that live there")
    ] = None,
    out: Annotated[Path, typer.Option(help="checkpoints, log, table and curves go here")] = Path("runs/recommender"),
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str = "timestamp",
    action_column: Annotated[str, typer.Option(help="column of actions; 'none' where there is none")] = "rating",
    class_columns: Annotated[
        str, typer.Option(help="columns of the second run's composite token; 'none' skips the run")
    ] = "class,rating",
    steps: Annotated[int, typer.Option(help="updates of the main run and its ablation")] = 700,
    class_steps: Annotated[int, typer.Option(help="updates of the run on composite tokens")] = 300,
    ablation: Annotated[bool, typer.Option(help="also train without recency and action")] = True,
    batch_size: Annotated[int, typer.Option(help="samples per process")] = 64,
    recent_length: int = 50,
    long_length: int = 200,
    dim: int = 64,
    layers: int = 2,
    negatives: int = 63,
    learning_rate: float = 2e-3,
    ssp: Annotated[int, typer.Option(help="ranks per sequence-sparsity group; 0 takes all")] = 0,
    strategy: Annotated[str, typer.Option(help="of the long branch: owner, gather or auto")] = "owner",
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoints in --out")] = False,
) -> None:
    """Train on items, without recency and action, and on composite tokens; then compare with plain attention and report."""
    columns: dict[str, str] = {"user": user_column, "item": item_column, "time": time_column}
    options = {name: f"--{name}-column" for name in (*columns, "action")}
    options |= {"tokens": "--class-columns", "item_path": "--item", "action=None": "'none'"}
    action = None if action_column == "none" else action_column
    runs: list[tuple[str, tuple[str, ...], bool, int]] = [("items", (item_column,), True, steps)]
    if class_columns != "none":
        runs.append((class_columns, tuple(class_columns.split(",")), True, class_steps))
    if ablation:
        runs.append(("items, no recency or action", (item_column,), False, steps))
    try:  # all of it before anything trains
        loaded = {
            tokens: load_interactions(inter, item, tokens=tokens, action=action, names=options, **columns)
            for tokens in dict.fromkeys(tokens for _, tokens, _, _ in runs)
        }
    except ValueError as error:
        raise SystemExit(f"{error}\n--class-columns 'none' does without the run on classes") from None

    stop = StopFlag()
    group = _join(ssp)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        print(
            f"{group.data_parallel_size} process(es) on {group.device.type}, {group.size} rank(s) per SSP group",
            flush=True,
        )

    outcomes = []
    for name, tokens, sides, updates in runs:
        data = loaded[tokens]
        by_item = tokens == (item_column,)
        config = RecommenderConfig(
            vocab_size=data.n_items if by_item else data.n_items + data.n_tokens,
            num_actions=data.n_actions,
            batch_size=batch_size,
            recent_length=recent_length,
            long_length=long_length,
            dim=dim,
            num_layers=layers,
            recency=sides,
            action=sides and action is not None,
            strategy=strategy,
            backend="reference" if group.device.type == "cuda" else None,
        )
        trainer = RecommenderTrainer(
            data,
            config,
            tokens_are_items=by_item,
            num_negatives=negatives,
            learning_rate=learning_rate,
            seed=seed,
            group=group,
        )
        outcome = run(name, trainer, updates, out / _slug(name), first, resume, stop)
        if outcome is None:
            if first:
                print(f"stopped in run '{name}'; go on with --resume")
            break
        outcomes.append(outcome)
    else:
        if first:
            data = loaded[(item_column,)]
            print_outcomes(outcomes, popularity_baseline(data, "test"), group)
            write_curves(outcomes, popularity_baseline(data, "valid"), out / "curves.png")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run(
    name: str,
    trainer: RecommenderTrainer,
    steps: int,
    folder: Path,
    first: bool,
    resume: bool,
    stop: Callable[[], bool],
) -> Outcome | None:
    """Train one model and measure it; None if it was stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    if resume and first and not (folder / "latest").exists():
        print(f"{folder} holds no checkpoint: '{name}' starts from the beginning", flush=True)
    with Progress(name, steps, enabled=first) as progress:
        log, finished = train(
            trainer,
            steps,
            folder,
            resume=resume,
            evaluate_every=max(1, steps // 5),
            save_every=50,
            stop_requested=stop,
            on_step=progress.update,
        )
    if not finished:
        return None
    share = trainer.interactions.multiplicity(trainer.config.long_length)
    return Outcome(name, log, trainer.evaluate("test"), compare(trainer), share.total)


def popularity_baseline(data: Interactions, part: Part) -> dict[str, float]:
    """The same protocol with items ranked by how often they occur in training."""
    scores = popularity_scores(torch.from_numpy(data.items[events_to_train(data)]), data.n_items)
    batches = HistoryBatches(data, batch_size=data.n_users, sequence_length=1, n_negatives=0)
    batch = batches.evaluation_batch(part, 0)
    seen = batch.seen_mask(data.n_items)
    ranks = positive_ranks(scores.expand(len(seen), -1), batch.positive, seen)
    return mean_metrics(ranking_metrics(ranks, candidate_counts(batch.positive, seen), weights=batch.weights))


def _join(ssp: int) -> SSPGroup:
    if "RANK" not in os.environ:
        return SSPGroup(None)
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one GPU per process, or none
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    return create_ssp_group(ssp or dist.get_world_size())


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    typer.run(main)
