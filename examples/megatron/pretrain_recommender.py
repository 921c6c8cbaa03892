"""Pretrain a recommender on item histories with megatron.core alone: predict masked items from the others of a history.

    torchrun --nproc_per_node 2 examples/megatron/pretrain_recommender.py --ta-ssp-size 2

On CUDA: NCCL, Megatron's DDP and (distributed) optimizer, TP, CP and SSP. On CPU: gloo, our own reduction and torch's AdamW.
Histories are drawn from a Zipf distribution around each user's taste, or read from --data, one history of item ids per line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ta_plugin.megatron import TokenizedModel, create_ssp_groups, get_mixed_block_spec, loss_function
from ta_plugin.megatron.arguments import add_ta_arguments, model_options
from ta_plugin.megatron.checkpoint import save_checkpoint
from ta_plugin.megatron.gradients import clip_gradients, reduce_gradients

Batch = tuple[Tensor, Tensor, Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "tensor-model-parallel-size": 1,
        "context-parallel-size": 1,
        "num-layers": 2,
        "hidden-size": 64,
        "num-attention-heads": 4,
        "items": 2000,
        "micro-batch-size": 16,
        "seq-length": 64,
        "train-iters": 50,
        "seed": 1234,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--data", help="a file with one history per line: item ids separated by spaces")
    parser.add_argument(
        "--save", help="directory to save a checkpoint into at the end (Megatron writes them on CUDA only)"
    )
    args = add_ta_arguments(parser).parse_args()
    if args.save and not torch.cuda.is_available():
        parser.error("--save needs CUDA: megatron.core.dist_checkpointing synchronises with the device")
    return args


def histories(args: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> Iterator[Batch]:
    """Batches of this data-parallel rank: tokens with masked items, lengths, and labels where an item was masked."""
    generator = torch.Generator().manual_seed(args.seed + rank)
    lines = None
    if args.data:
        with open(args.data) as file:
            lines = [[int(item) for item in line.split()[: args.seq_length]] for line in file][rank::ranks]
    popularity = 1.0 / torch.arange(1, args.items + 1)
    position = 0
    while True:
        tokens = torch.zeros(args.micro_batch_size, args.seq_length, dtype=torch.int64)
        lengths = torch.full((args.micro_batch_size,), args.seq_length)
        for sample in range(args.micro_batch_size):
            if lines is not None:
                history = torch.tensor(lines[position % len(lines)], dtype=torch.int64)
                position += 1
            else:
                taste = torch.multinomial(popularity, 12, generator=generator)
                history = taste[torch.randint(0, 12, (args.seq_length,), generator=generator)]
            tokens[sample, : len(history)], lengths[sample] = history, len(history)
        masked = torch.rand(tokens.shape, generator=generator) < 0.15
        labels = tokens.masked_fill(~masked, -100)
        tokens = tokens.masked_fill(masked, args.items)  # the last id is the mask
        yield tokens.to(device), lengths.to(device), labels.to(device)


class MegatronStep:
    """One optimizer step with Megatron's DDP and optimizer (CUDA)."""

    def __init__(self, args: argparse.Namespace, model: TokenizedModel, groups: ProcessGroupCollection) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        config = model.config
        distributed = args.use_distributed_optimizer
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=True, overlap_param_gather=distributed
        )
        wrapped = Float16Module(config, model) if args.bf16 else model
        self.model = DistributedDataParallel(config, ddp_config, wrapped, pg_collection=groups)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.lr,
                bf16=args.bf16,
                params_dtype=config.params_dtype,
                clip_grad=args.clip_grad,
                use_distributed_optimizer=distributed,
            ),
            [self.model],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        self.groups, self.context = groups, args.context_parallel_size

    def __call__(self, batch: Batch) -> tuple[Tensor, float]:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, object]:
            tokens, lengths, labels = next(batches)
            return model(tokens, lengths, labels), loss_function(labels, lengths, context_parallel_size=self.context)

        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=self.model,
            num_microbatches=1,
            seq_length=batch[0].shape[1],
            micro_batch_size=batch[0].shape[0],
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        return reports[0]["lm loss"], float(norm)


class PlainStep:
    """One optimizer step with our own reduction and torch's AdamW (CPU)."""

    def __init__(self, args: argparse.Namespace, model: TokenizedModel, groups: ProcessGroupCollection) -> None:
        self.model, self.groups, self.args = model, groups, args
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)

    def __call__(self, batch: Batch) -> tuple[Tensor, float]:
        tokens, lengths, labels = batch
        self.optimizer.zero_grad()
        reduce = loss_function(labels, lengths, context_parallel_size=self.args.context_parallel_size)
        total, count, report = reduce(self.model(tokens, lengths, labels))
        (total / count.clamp(min=1)).backward()
        reduce_gradients(self.model.parameters(), self.groups)
        norm = clip_gradients(self.model.parameters(), self.groups, self.args.clip_grad)
        self.optimizer.step()
        return report["lm loss"], norm


def main() -> None:
    args = parse_arguments()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, context_parallel_size=args.context_parallel_size
    )
    groups = create_ssp_groups(args.ta_ssp_size).attach()
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed, inference_rng_tracker=not cuda)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not cuda,
        params_dtype=dtype,
        bf16=args.bf16,
        gradient_accumulation_fusion=False,
    )
    vocab = -(-(args.items + 1) // 128) * 128  # the mask is an id too; tensor parallelism divides the output
    spec = None
    if args.ta_tokenized_layers is not None:
        spec = get_mixed_block_spec(config, args.ta_tokenized_layers, pp_rank=0)
    model = TokenizedModel(config, vocab, spec, pg_collection=groups, embedding_seed=args.seed, **model_options(args))
    model.to(device)
    step = MegatronStep(args, model, groups) if cuda else PlainStep(args, model, groups)
    batches = histories(args, groups.dp.rank(), groups.dp.size(), device)
    for iteration in range(1, args.train_iters + 1):
        report, norm = step(next(batches))
        dist.all_reduce(report, group=groups.dp_cp)
        if dist.get_rank() == 0 and (iteration % 10 == 0 or iteration == 1):
            print(f"iteration {iteration:5d}  loss {report[0] / report[1]:.4f}  grad norm {norm:.3f}", flush=True)
    if args.save:
        save_checkpoint(args.save, [model], None, iteration=args.train_iters)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
