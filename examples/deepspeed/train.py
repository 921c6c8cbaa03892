"""Train the sequence recommender with DeepSpeed; what makes it distributed is the "tokenized_attention" block of the config.

    bash ../movielens.sh data
    deepspeed --num_gpus 2 train.py --inter data/ml-100k.inter --deepspeed --deepspeed_config ds_config_zero1.json

On CPUs: DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py ... with the same arguments; DeepSpeed compiles its
shared-memory collectives first, which takes about two minutes, once. Prints losses and ranking metrics; checkpoints and the curve
of the loss go to --out. Ctrl-C ends it after the step, with a checkpoint; --resume goes on. Two nodes: two_nodes.sh.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ta_plugin.deepspeed
from ta_plugin import ShardedTokenEmbedding
from ta_plugin.data.atomic import atomic_columns
from ta_plugin.data.batches import HistoryBatches
from ta_plugin.data.interactions import Interactions, load_interactions
from ta_plugin.models.metrics import candidate_counts, mean_metrics, positive_ranks, ranking_metrics
from ta_plugin.models.recommender import RecommenderConfig, SequenceRecommender, sampled_softmax_loss
from ta_plugin.models.stopping import StopFlag

SHOW_EVERY = 20


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's own calls
    options = parse()
    deepspeed.init_distributed()
    data = read(options.inter)
    engine = build_engine(options, data.n_items, data.n_actions)
    batches = HistoryBatches(
        data,
        batch_size=engine.train_micro_batch_size_per_gpu(),
        sequence_length=options.length,
        n_negatives=63,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        seed=0,
        min_history=1,
    )
    say(describe(engine, data, batches))
    done, losses = train(engine, batches, options)
    say(f"the newest checkpoint is {options.out}/global_step{engine.global_steps}")
    if losses and dist.get_rank() == 0:
        plot(losses, Path(options.out) / "loss.png")
    if done == options.steps:
        metrics = evaluate(engine, batches, data.n_items)
        say("test: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    else:
        say(f"stopped after step {done}; go on with --resume")
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


def train(engine: Any, batches: HistoryBatches, options: argparse.Namespace) -> tuple[int, dict[int, float]]:
    """The steps done, and the mean loss of all ranks over the last steps, by step. Ends early on Ctrl-C; saves now and then."""
    first = resume(engine, options.out) if options.resume else 0
    losses: dict[int, float] = {}
    stop, shown, since, done = StopFlag(), first, time.monotonic(), first
    recent, world = torch.zeros((), device=engine.device), dist.get_world_size()
    accumulate = engine.gradient_accumulation_steps()
    stopping = False
    while done < options.steps and not stopping:
        for micro in range(done * accumulate, (done + 1) * accumulate):
            batch = batches.batch(*divmod(micro, batches.steps_per_epoch)).to(engine.device)
            announced = torch.stack([batch.weights.sum(), batch.weights.new_tensor(float(stop()))])
            dist.all_reduce(announced)
            total, asked = announced.tolist()
            stopping = stopping or asked > 0
            logits = engine(batch.tokens, batch.lengths, batch.ages, batch.actions, batch.targets)
            loss = sampled_softmax_loss(logits, batch.weights, max(total, 1.0), world)
            engine.backward(loss)
            engine.step()  # updates once per `accumulate` calls
            recent += loss.detach() / accumulate
        done += 1
        ends = stopping or done == options.steps
        if done % SHOW_EVERY == 0 or ends:
            dist.all_reduce(recent)
            losses[done] = float(recent) / world / (done - shown)
            speed = 1000 * (time.monotonic() - since) / (done - shown)
            say(f"step {done}/{options.steps}: loss {losses[done]:.4f}, {speed:.0f} ms a step")
            recent, shown, since = torch.zeros_like(recent), done, time.monotonic()
        if done % options.save_every == 0 or ends:
            engine.save_checkpoint(options.out, client_state={"step": done})
    return done, losses


def resume(engine: Any, folder: str) -> int:
    """The steps that the newest checkpoint of `folder` has behind it."""
    path, state = engine.load_checkpoint(folder)
    if path is None:
        raise SystemExit(f"--resume: {folder} holds no checkpoint; leave --resume out, or name its folder with --out")
    say(f"resumed after step {state['step']}")
    return int(state["step"])


def say(text: str) -> None:
    """On rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def describe(engine: Any, data: Interactions, batches: HistoryBatches) -> str:
    plugin = getattr(engine, "tokenized_attention", None)
    layout = "block off" if plugin is None else f"{plugin.group.size} rank(s) per SSP group"
    return (
        f"{data.n_items} items, {batches.steps_per_epoch} steps an epoch of {batches.batch_size} samples on each of "
        f"{dist.get_world_size()} rank(s); ZeRO stage {engine.zero_optimization_stage()}, {layout}"
    )


def plot(losses: dict[int, float], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        say("no curve: pip install matplotlib")
        return
    axes = (figure := Figure(figsize=(6, 4))).add_subplot()
    axes.plot(list(losses), list(losses.values()))
    axes.set(xlabel="step", ylabel="sampled softmax loss")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inter", type=Path, required=True, help="RecBole atomic file of interactions")
    parser.add_argument("--out", default="runs/deepspeed", help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=100, help="events of a history")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    options = deepspeed.add_config_arguments(parser).parse_args()
    if not options.deepspeed_config:
        parser.error("pass --deepspeed --deepspeed_config FILE, such as ds_config_zero1.json beside this script")
    return options


def read(inter: str) -> Interactions:
    """Histories of items; what users did with them where the file has a column "rating"."""
    try:
        return load_interactions(inter, action="rating" if "rating" in atomic_columns(inter) else None)
    except ValueError as error:
        raise SystemExit(f"--inter: {error}") from None


def build_engine(options: argparse.Namespace, n_items: int, n_actions: int) -> Any:
    """An engine around the recommender; nothing here knows on how many ranks the table will lie."""
    device = get_accelerator().device_name(int(os.environ.get("LOCAL_RANK", 0)))
    batch_size = deepspeed.DeepSpeedConfig(options.deepspeed_config).train_micro_batch_size_per_gpu
    config = RecommenderConfig(
        vocab_size=n_items,
        num_actions=n_actions,
        batch_size=batch_size,
        recent_length=min(50, options.length),
        long_length=options.length,
        backend="reference" if device != "cpu" else None,
    )
    torch.manual_seed(0)
    table = ShardedTokenEmbedding(n_items, config.dim, device=device)
    model = SequenceRecommender(config, table)
    if options.local_rank < 0:
        del options.local_rank  # not started by the deepspeed launcher
    return ta_plugin.deepspeed.initialize(args=options, model=model, model_parameters=model.parameters())[0]


@torch.no_grad()
def evaluate(engine: Any, batches: HistoryBatches, n_items: int) -> dict[str, float]:
    """Ranking metrics of the held-out event among all items not seen before, over all users."""
    items = torch.arange(n_items, device=engine.device).expand(batches.batch_size, -1)
    sums: dict[str, torch.Tensor] = {}
    for step in range(batches.evaluation_steps("test")):
        batch = batches.evaluation_batch("test", step).to(engine.device)
        scores = engine(batch.tokens, batch.lengths, batch.ages, batch.actions, items)
        seen = batch.seen_mask(n_items)
        ranks = positive_ranks(scores, batch.positive, seen)
        found = ranking_metrics(ranks, candidate_counts(batch.positive, seen), weights=batch.weights)
        sums = {name: value + sums.get(name, 0.0) for name, value in found.items()}
    for value in sums.values():
        dist.all_reduce(value)
    return mean_metrics(sums)


if __name__ == "__main__":
    main()
