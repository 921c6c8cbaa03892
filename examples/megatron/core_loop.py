"""Training on megatron.core alone, which the examples share: arguments, groups, one optimizer step, and the loop around it.

On CUDA: NCCL, Megatron's DDP and (distributed) optimizer, TP, CP and SSP. On CPU: gloo, our own reduction and torch's AdamW.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ta_plugin.megatron import create_ssp_groups, loss_function
from ta_plugin.megatron.arguments import add_ta_arguments
from ta_plugin.megatron.checkpoint import load_checkpoint, save_checkpoint
from ta_plugin.megatron.gradients import clip_gradients, reduce_gradients
from ta_plugin.models.stopping import StopFlag

Batch = tuple[Tensor, Tensor, Tensor]
MASKED = 0.15  # share of the occurrences that are hidden and predicted


def core_parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Megatron's names for what this loop knows, the group of ta_plugin, and `defaults` beside or instead of these."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "micro_batch_size": 16,
        "seq_length": 64,
        "train_iters": 50,
        "seed": 1234,
    }
    for name, default in (numbers | defaults).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument(
        "--save", type=Path, help="folder for checkpoints: now and then, at the end, and on Ctrl-C; the newest is kept"
    )
    parser.add_argument("--save-interval", type=int, default=100, help="iterations between checkpoints")
    parser.add_argument("--load", type=Path, help="go on from the newest checkpoint in this folder")
    return add_ta_arguments(parser)


def set_up(args: argparse.Namespace) -> tuple[ProcessGroupCollection, torch.device]:
    """torch.distributed, Megatron's groups and the SSP group beside them; this rank's device."""
    cuda, here = torch.cuda.is_available(), int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda and here > torch.cuda.device_count():
        raise SystemExit(
            f"{here} processes on {torch.cuda.device_count()} GPU(s); start as many, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
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
    return groups, device


def config_of(args: argparse.Namespace, **changes: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
        "sequence_parallel": args.sequence_parallel,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "bf16": args.bf16,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(options | changes))


def mask_tokens(tokens: Tensor, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens with some replaced by the id `mask`, and labels: the token where it was replaced, -100 elsewhere."""
    masked = (torch.rand(tokens.shape, generator=generator) < MASKED).to(tokens.device)
    return tokens.masked_fill(masked, mask), tokens.masked_fill(~masked, -100)


class MegatronStep:
    """One optimizer step with Megatron's DDP and optimizer (CUDA)."""

    def __init__(self, args: argparse.Namespace, model: Any, groups: ProcessGroupCollection) -> None:
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
        self.context = args.context_parallel_size

    def __call__(self, batch: Batch) -> tuple[Tensor, float]:
        """(sum of losses, number of labels) of this rank, and the gradient's norm."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward(batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, object]:
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

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, [self.model], self.optimizer)

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, [self.model], self.optimizer)


class PlainStep:
    """One optimizer step with our own reduction and torch's AdamW (CPU)."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, groups: ProcessGroupCollection) -> None:
        self.model, self.groups, self.args = model, groups, args
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)

    def __call__(self, batch: Batch) -> tuple[Tensor, float]:
        """(sum of losses, number of labels) of this rank, and the gradient's norm."""
        tokens, lengths, labels = batch
        self.optimizer.zero_grad()
        reduce = loss_function(labels, lengths, context_parallel_size=self.args.context_parallel_size)
        total, count, report = reduce(self.model(tokens, lengths, labels))
        (total / count.clamp(min=1)).backward()
        reduce_gradients(self.model.parameters(), self.groups)
        norm = clip_gradients(self.model.parameters(), self.groups, self.args.clip_grad)
        self.optimizer.step()
        return report["lm loss"], norm

    def save(self, folder: Path) -> None:
        """Megatron's writer needs CUDA."""
        checkpoints.save_rank(folder, model=self.model.state_dict(), optimizer=self.optimizer.state_dict())

    def load(self, folder: Path) -> None:
        saved = checkpoints.load_rank(folder)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])


def train(args: argparse.Namespace, model: nn.Module, groups: ProcessGroupCollection, batches: Iterator[Batch]) -> bool:
    """Up to `args.train_iters` steps, printed now and then and saved where asked; whether it came to the end."""
    device = next(model.parameters()).device
    say(f"{dist.get_world_size()} process(es) on {device.type}, {groups.ssp.size()} rank(s) per SSP group")
    step = MegatronStep(args, model, groups) if device.type == "cuda" else PlainStep(args, model, groups)
    done = checkpoints.load(args.load, step) if args.load else 0
    for _ in range(done):
        next(batches)  # drawn as before, so that the rest is what an undisturbed run would see
    if done:
        say(f"resumed after iteration {done}")
    stop = StopFlag()
    for iteration in range(done + 1, args.train_iters + 1):
        report, norm = step(tuple(part.to(device) for part in next(batches)))
        dist.all_reduce(report, group=groups.dp_cp)
        stopping = report.new_tensor(float(stop()))
        dist.all_reduce(stopping)
        ends = iteration == args.train_iters or float(stopping) > 0
        if iteration % 10 == 0 or iteration == 1 or ends:
            say(f"iteration {iteration:5d}  loss {float(report[0] / report[1]):.4f}  grad norm {norm:.3f}")
        if args.save and (iteration % args.save_interval == 0 or ends):
            checkpoints.save(args.save, step, iteration)
        if ends and iteration < args.train_iters:
            say(f"stopped after iteration {iteration}" + (f"; go on with --load {args.save}" if args.save else ""))
            return False
    return True


def say(text: str) -> None:
    """On rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)
