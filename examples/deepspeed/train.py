"""Train the sequence recommender with DeepSpeed; what makes it distributed is the "tokenized_attention" block of the config.

    deepspeed --num_gpus 2 train.py --inter ml-100k.inter --deepspeed --deepspeed_config ds_config_zero1.json

On CPUs: DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 train.py ... with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ta_plugin.deepspeed
from ta_plugin import ShardedTokenEmbedding
from ta_plugin.data.batches import HistoryBatches
from ta_plugin.data.interactions import load_interactions
from ta_plugin.models.metrics import candidate_counts, mean_metrics, positive_ranks, ranking_metrics
from ta_plugin.models.recommender import RecommenderConfig, SequenceRecommender, sampled_softmax_loss


def main() -> None:
    options = parse()
    deepspeed.init_distributed()
    rank, world = dist.get_rank(), dist.get_world_size()
    data = load_interactions(options.inter, tokens=("item_id",), action="rating")
    batches = HistoryBatches(
        data,
        batch_size=options.batch_size,
        sequence_length=options.length,
        n_negatives=63,
        rank=rank,
        world_size=world,
        seed=0,
        min_history=1,
    )
    engine = build_engine(options, data.n_items, data.n_actions)
    first = 0
    if options.resume:
        _, state = engine.load_checkpoint(options.out)
        first = state["step"]
    for step in range(first, options.steps):
        epoch, within = divmod(step, batches.steps_per_epoch)
        batch = batches.batch(epoch, within).to(engine.device)
        total = batch.weights.sum()
        dist.all_reduce(total)
        logits = engine(batch.tokens, batch.lengths, batch.ages, batch.actions, batch.targets)
        loss = sampled_softmax_loss(logits, batch.weights, max(float(total), 1.0), world)
        engine.backward(loss)
        engine.step()
        if (step + 1) % 20 == 0 or step + 1 == options.steps:
            shown = loss.detach().clone()
            dist.all_reduce(shown)
            if rank == 0:
                print(f"step {step + 1}: loss {float(shown) / world:.4f}", flush=True)
    engine.save_checkpoint(options.out, client_state={"step": options.steps})
    metrics = evaluate(engine, batches, data.n_items)
    if rank == 0:
        print("test: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inter", type=Path, required=True, help="RecBole atomic file of interactions")
    parser.add_argument("--out", default="runs/deepspeed", help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=100, help="events of a history")
    parser.add_argument("--batch_size", type=int, default=64, help="samples per rank: train_micro_batch_size_per_gpu")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def build_engine(options: argparse.Namespace, n_items: int, n_actions: int) -> Any:
    """An engine around the recommender; nothing here knows on how many ranks the table will lie."""
    config = RecommenderConfig(
        vocab_size=n_items,
        num_actions=n_actions,
        batch_size=options.batch_size,
        recent_length=min(50, options.length),
        long_length=options.length,
    )
    torch.manual_seed(0)
    table = ShardedTokenEmbedding(n_items, config.dim)
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
