"""Training a TokenizedModel in one layout of ranks; every function here runs on each rank of a pool."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from cuda_on_cpu import cuda_on_cpu
from dense_model import Sizes, microbatch, weight
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import ON_GPUS, own_groups

from ta_plugin.megatron import TokenizedModel, create_ssp_groups, get_mixed_block_spec, loss_function
from ta_plugin.megatron.checkpoint import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Layout:
    """One way to spread the same training run over the ranks."""

    ssp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    recompute: str = ""
    row_multiple: int = 1
    row_capacity: int | tuple[int, ...] | None = None
    tokenized_layers: int | None = None  # None: all
    causal_top: bool = False
    bf16: bool = False
    chunks: tuple[int, ...] | None = None  # layout "sequence": how many positions each context-parallel rank reads
    sizes: Sizes = field(default_factory=Sizes)


@dataclass
class Run:
    """A model in training on this rank."""

    layout: Layout
    groups: ProcessGroupCollection
    chunks: list[Any]
    ddp: list[Any]
    optimizer: Any

    def step(self, step: int, batches: Iterator[Any] | None = None) -> tuple[float | None, float]:
        """Loss (on the last stage) and gradient norm of one optimizer step, on its own microbatches or on `batches`."""
        for model in self.ddp:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sizes, dp, capacity = self.layout.sizes, self.groups.dp, self.layout.row_capacity
        mine = range(dp.rank(), sizes.microbatches, dp.size())
        iterators = [iter([microbatch(sizes, step, i) for i in mine]) for _ in self.ddp]
        several = len(self.ddp) > 1
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=batches or (iterators if several else iterators[0]),
            model=self.ddp if several else self.ddp[0],
            num_microbatches=len(mine),
            seq_length=capacity if isinstance(capacity, int) else sizes.length,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        return self._loss(reports), float(norm)

    def _forward(self, iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        tokens, lengths, labels = next(iterator)
        if self.layout.chunks is not None:
            tokens, lengths, labels = self._chunk(tokens, lengths, labels)
            reduce = loss_function(labels, lengths, context_parallel_size=self.layout.cp, chunks_on=self.groups.cp)
            return model(tokens, lengths, labels), reduce
        return model(tokens, lengths, labels), loss_function(labels, lengths, context_parallel_size=self.layout.cp)

    def _chunk(self, tokens: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        sizes, rank = self.layout.chunks, self.groups.cp.rank()
        assert sizes is not None
        first = sum(sizes[:rank])
        mine = slice(first, first + sizes[rank])
        return [tokens[:, mine], (lengths - first).clamp(0, sizes[rank]), labels[:, mine]]

    def _loss(self, reports: list[dict[str, torch.Tensor]]) -> float | None:
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        sums = torch.stack([r["lm loss"] for r in reports])
        dist.all_reduce(sums, group=self.groups.cp)
        mean = (sums[:, 0] / sums[:, 1].clamp(min=1)).sum()
        dist.all_reduce(mean, group=self.groups.dp)
        return mean.item() / self.layout.sizes.microbatches


@contextmanager
def megatron(layout: Layout) -> Iterator[ProcessGroupCollection]:
    """Model-parallel groups with SSP attached, on CPU; taken down afterwards."""
    with nullcontext() if ON_GPUS else cuda_on_cpu(), own_groups():
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.tp if layout.ep > 1 else None,
            create_gloo_process_groups=False,
        )
        try:
            model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
            yield create_ssp_groups(layout.ssp).attach()
        finally:
            parallel_state.destroy_model_parallel()


def config_of(layout: Layout, **changes: Any) -> TransformerConfig:
    sizes = layout.sizes
    options: dict[str, Any] = {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.groups,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "params_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "bf16": layout.bf16,
        "variable_seq_lengths": layout.pp > 1 and not isinstance(layout.row_capacity, int),
        "overlap_p2p_comm": layout.vpp is not None,
        "moe_token_dispatcher_type": "alltoall",  # variable lengths ask for it even without experts
        "calculate_per_token_loss": layout.sizes.per_token,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "batch_p2p_comm": not layout.vpp,
    }
    if layout.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif layout.recompute:
        options |= {"recompute_granularity": "selective"}
    if sizes.experts:
        options |= {
            "num_moe_experts": sizes.experts,
            "moe_router_topk": sizes.top_k,
            "moe_aux_loss_coeff": sizes.aux_coeff,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_ffn_hidden_size": sizes.ffn,
            "add_bias_linear": False,
        }
    return TransformerConfig(**(options | changes))


def build(layout: Layout, groups: ProcessGroupCollection) -> Run:
    config = config_of(layout)
    chunks = []
    for stage in range(layout.vpp or 1):
        vp = stage if layout.vpp else None
        spec = None
        if layout.tokenized_layers is not None:
            spec = get_mixed_block_spec(
                config, layout.tokenized_layers, causal=layout.causal_top, vp_stage=vp, pp_rank=groups.pp.rank()
            )
        model = TokenizedModel(
            config,
            layout.sizes.vocab,
            spec,
            pg_collection=groups,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp is None, vp_stage=vp),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp is None, vp_stage=vp),
            vp_stage=vp,
            row_multiple=layout.row_multiple,
            row_capacity=layout.row_capacity,
            vocab_divisible_by=8,
            layout="sample" if layout.chunks is None else "sequence",
        )
        fill(model, layout)
        model.cuda()  # the CPU stand-in leaves it where it is
        chunks.append(Float16Module(config, model) if layout.bf16 else model)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        grad_reduce_in_fp32=layout.bf16,
    )
    ddp = [
        DistributedDataParallel(config, ddp_config, m, disable_bucketing=i > 0, pg_collection=groups)
        for i, m in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=layout.sizes.lr,
            weight_decay=0.0,
            clip_grad=layout.sizes.clip,
            bf16=layout.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        ),
        ddp,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap:
        config.no_sync_func = ddp[0].no_sync if len(ddp) == 1 else [m.no_sync for m in ddp]
    return Run(layout, groups, chunks, ddp, optimizer)


@torch.no_grad()
def fill(model: TokenizedModel, layout: Layout) -> None:
    """This rank's part of the weights that every layout starts from."""
    sizes, tp_rank = layout.sizes, parallel_state.get_tensor_model_parallel_rank()
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            model.embedding.load_dense(weight(name, (sizes.vocab, sizes.hidden)))
            continue
        parts = name.split(".")
        if name.startswith("decoder.layers."):
            parts[2] = str(numbers[int(parts[2])])
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            local = sizes.experts // layout.ep
            parts[at] = str(int(parts[at]) + local * parallel_state.get_expert_model_parallel_rank())
        shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False) and layout.tp > 1
        if sharded:
            shape[parameter.partition_dim] *= layout.tp
        whole = weight(".".join(parts), tuple(shape))
        parameter.copy_(whole.chunk(layout.tp, parameter.partition_dim)[tp_rank] if sharded else whole)


def train(layout: Layout, steps: int) -> tuple[list[float] | None, list[float]]:
    """Losses (None but on the last stage) and gradient norms."""
    with megatron(layout) as groups:
        run = build(layout, groups)
        outcomes = [run.step(step) for step in range(steps)]
    losses = [loss for loss, _ in outcomes]
    return (None if losses[0] is None else losses), [norm for _, norm in outcomes]


def with_sizes(layout: Layout, **changes: Any) -> Layout:
    return replace(layout, sizes=replace(layout.sizes, **changes))


def train_and_save(layout: Layout, steps: int, path: str) -> list[float] | None:
    """Losses of `steps` steps; then a checkpoint."""
    multiprocessing.current_process()._config["daemon"] = False  # the checkpoint writer starts processes of its own
    with megatron(layout) as groups:
        run = build(layout, groups)
        losses = [run.step(step)[0] for step in range(steps)]
        save_checkpoint(path, run.ddp, run.optimizer, step=steps)
        filesystem_async._results_queue = None  # ends the writer's manager process, which would outlive this one
    return None if losses[0] is None else losses  # type: ignore[return-value]


def resume(layout: Layout, steps: int, path: str) -> tuple[list[float] | None, list[float]]:
    """Losses and gradient norms of the `steps` steps after the checkpoint, from weights that start as something else."""
    with megatron(layout) as groups:
        run = build(layout, groups)
        with torch.no_grad():
            for chunk in run.chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(0.5)
        first = load_checkpoint(path, run.ddp, run.optimizer)["step"]
        outcomes = [run.step(step) for step in range(first, first + steps)]
    losses = [loss for loss, _ in outcomes]
    return (None if losses[0] is None else losses), [norm for _, norm in outcomes]  # type: ignore[return-value]
