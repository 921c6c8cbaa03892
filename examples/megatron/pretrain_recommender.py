"""Pretrain a recommender on item histories with megatron.core alone: the next item from the others of a history.

    torchrun --nproc_per_node 2 examples/megatron/pretrain_recommender.py --ta-ssp-size 2 --inter data/ml-100k/ml-100k.inter

Each history ends in a mask token, whose item is predicted; the layers run on its distinct items. With --inter, a RecBole file, the
last item of every user is held out and ranked at the end. Without, items are drawn from a Zipf distribution around each user's
taste, and 15% of them are masked. See core_loop.py for what it runs on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from core_loop import Batch, config_of, core_parser, mask_tokens, set_up, train
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ta_plugin.data.batches import HistoryBatches
from ta_plugin.data.interactions import events_to_train, load_interactions
from ta_plugin.megatron import TokenizedModel, get_mixed_block_spec
from ta_plugin.megatron.arguments import model_options
from ta_plugin.models.metrics import candidate_counts, mean_metrics, popularity_scores, positive_ranks, ranking_metrics


def parse_arguments() -> argparse.Namespace:
    parser = core_parser(__doc__, items=2000)
    parser.add_argument("--inter", help="a RecBole file of interactions: user_id, item_id, timestamp; decides --items")
    args = parser.parse_args()
    if args.inter and args.tensor_model_parallel_size * args.context_parallel_size > 1:
        parser.error(
            "--inter ends in a ranking of all items, which this script does without tensor and context parallelism"
        )
    return args


def drawn_histories(args: argparse.Namespace, rank: int) -> Iterator[Batch]:
    """Batches of this data-parallel rank: tokens with masked items, lengths, and labels where an item was masked."""
    generator = torch.Generator().manual_seed(args.seed + rank)
    popularity = 1.0 / torch.arange(1, args.items + 1)
    lengths = torch.full((args.micro_batch_size,), args.seq_length)
    while True:
        tastes = torch.stack([torch.multinomial(popularity, 12, generator=generator) for _ in lengths])
        choice = torch.randint(0, 12, (args.micro_batch_size, args.seq_length), generator=generator)
        tokens, labels = mask_tokens(tastes.gather(1, choice), args.items, generator)
        yield tokens, lengths, labels


def read_histories(args: argparse.Namespace, batches: HistoryBatches) -> Iterator[Batch]:
    """The same from data: every event that trains, once an epoch, is what the mask at the end of its history hides."""
    epoch = 0
    while True:
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch, step)
            tokens, lengths = with_mask(batch.tokens, batch.lengths, args.items)
            labels = torch.full_like(tokens, -100)
            real = batch.weights > 0
            labels[real, batch.lengths[real]] = batch.targets[real, 0]
            yield tokens, lengths * real, labels
        epoch += 1


def with_mask(tokens: Tensor, lengths: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """Histories (B, L) with the mask token after their last item, (B, L + 1)."""
    longer = torch.nn.functional.pad(tokens, (0, 1))
    return longer.scatter_(1, lengths[:, None], mask), lengths + 1


def rank_held_out(batches: HistoryBatches, score: Callable[[Any], Tensor], groups: ProcessGroupCollection) -> str:
    """Each user's last item among all that the user had not met: metrics over all ranks, as a line."""
    sums: dict[str, Tensor] = {}
    items = batches.interactions.n_items
    for step in range(batches.evaluation_steps("test")):
        batch = batches.evaluation_batch("test", step)
        seen = batch.seen_mask(items)
        ranks = positive_ranks(score(batch), batch.positive, seen)
        counts = candidate_counts(batch.positive, seen)
        for name, value in ranking_metrics(ranks, counts, weights=batch.weights).items():
            sums[name] = sums.get(name, 0.0) + value
    total = torch.stack(list(sums.values())).to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    dist.all_reduce(total, group=groups.dp)
    metrics = mean_metrics(dict(zip(sums, total, strict=True)))
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def main() -> None:
    args = parse_arguments()
    groups, device = set_up(args)
    batches = None
    if args.inter:
        try:
            data = load_interactions(args.inter, action=None)
        except ValueError as error:
            raise SystemExit(f"--inter: {error}") from None
        args.items = data.n_items
        batches = HistoryBatches(
            data,
            batch_size=args.micro_batch_size,
            sequence_length=args.seq_length,
            n_negatives=0,
            rank=groups.dp.rank(),
            world_size=groups.dp.size(),
            seed=args.seed,
            min_history=1,
        )
    config = config_of(args)
    vocab = -(-(args.items + 1) // 128) * 128  # the mask is an id too; tensor parallelism divides the output
    spec = None
    if args.ta_tokenized_layers is not None:
        spec = get_mixed_block_spec(config, args.ta_tokenized_layers, pp_rank=0)
    model = TokenizedModel(config, vocab, spec, pg_collection=groups, embedding_seed=args.seed, **model_options(args))
    model.to(device)
    drawn = drawn_histories(args, groups.dp.rank()) if batches is None else read_histories(args, batches)
    finished = train(args, model, groups, drawn)
    if batches is not None and finished:

        @torch.no_grad()
        def score(batch: Any) -> Tensor:
            tokens, lengths = with_mask(batch.tokens, batch.lengths, args.items)
            last = torch.arange(tokens.shape[1]) == batch.lengths[:, None]
            logits = model(tokens.to(device), lengths.to(device), select=last.to(device))
            return logits[:, : args.items].float().cpu()

        popularity = popularity_scores(data.items[events_to_train(data)], data.n_items)
        by_popularity = rank_held_out(batches, lambda batch: popularity.expand(len(batch.positive), -1), groups)
        by_model = rank_held_out(batches, score, groups)
        if dist.get_rank() == 0:
            print(f"held-out items, by popularity: {by_popularity}\nheld-out items, by the model:   {by_model}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
