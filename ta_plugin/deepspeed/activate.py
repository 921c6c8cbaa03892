"""Turning the block on: `initialize` in place of DeepSpeed's, or `install` so that DeepSpeed's own honours the block."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from dataclasses import dataclass
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.utils.logging import print_dist
from torch import nn

from ta_plugin.deepspeed.checkpoint import TableCheckpoints
from ta_plugin.deepspeed.config import BLOCK, TokenizedAttentionConfig, agree_on_block
from ta_plugin.deepspeed.convert import Conversion, convert
from ta_plugin.deepspeed.groups import accelerator_device, create_groups, world_group
from ta_plugin.deepspeed.sharding import drop_parameters
from ta_plugin.deepspeed.training import TableTraining
from ta_plugin.parallel import SSPGroup
from ta_plugin.tokenized_attention import TokenizedAttention


@dataclass(frozen=True)
class Activation:
    """What an engine with the block carries as `engine.tokenized_attention`: its config, its SSP group, what was converted."""

    config: TokenizedAttentionConfig
    group: SSPGroup
    conversion: Conversion

    def attach(self, engine: Any) -> None:
        """Join the tables to the engine's step and checkpoints. Collective over the group."""
        if "tokenized_attention" in vars(engine):  # a patched DeepSpeed under an installed plugin: once is enough
            return
        engine.tokenized_attention = self
        tables = self.conversion.tables
        if tables or engine.pipeline_parallelism:
            following = [tables[name] for name in self.conversion.following]
            TableTraining(engine, list(tables.values()), self.group, following)
            TableCheckpoints(engine, tables)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with the "tokenized_attention" block of the config applied to `model` first.

    Same arguments and return value: (engine, optimizer, training_dataloader, lr_scheduler). Without the block, or with
    "enabled": false, it is deepspeed.initialize. The engine carries what was done as `engine.tokenized_attention`. Raises
    ValueError on every rank for a block that is wrong, or wrong for this number of ranks.
    """
    given = dict(
        args=args,
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        training_data=training_data,
        lr_scheduler=lr_scheduler,
        distributed_port=distributed_port,
        mpu=mpu,
        dist_init_required=dist_init_required,
        collate_fn=collate_fn,
        config=config,
        mesh_param=mesh_param,
        config_params=config_params,
    )
    source = getattr(args, "deepspeed_config", None) or config or config_params
    if model is None or source is None:
        return deepspeed.initialize(**given)  # which says what is missing
    deepspeed.init_distributed(
        get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    settings = dict(load_ds_config(source))
    if model_parameters is not None:
        given["model_parameters"] = model_parameters = list(model_parameters)
    activation = prepare(
        model, settings, mpu=mpu, optimizer=optimizer, model_parameters=model_parameters, mesh=mesh_param is not None
    )
    # the block is honoured here: an installed plugin must not find it again
    settings.pop(BLOCK, None)
    if getattr(args, "deepspeed_config", None):
        given["args"] = copy.copy(args)
        given["args"].deepspeed_config = None
    given.update(config=settings, config_params=None)
    result = deepspeed.initialize(**given)
    if activation is not None:
        activation.attach(result[0])
    return result


def prepare(
    model: nn.Module,
    config: dict[str, Any],
    *,
    mpu: Any = None,
    optimizer: Any = None,
    model_parameters: list[Any] | None = None,
    mesh: bool = False,
) -> Activation | None:
    """Read the block of `config` and convert `model` in place; None without a block. Collective over all ranks.

    Parameters that sharding replaced are removed from `optimizer` and `model_parameters`, in place.
    """
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))  # as the engine will: the exchange needs it
    world = world_group()
    block = agree_on_block(config, world)
    if block is None:
        return None
    mpu = model.mpu() if isinstance(model, PipelineModule) else mpu
    _refuse(block, config, mpu, mesh)
    sequence_group = _sequence_group(mpu) if block.layout == "sequence" else None
    size = sequence_group.size if block.size is None and sequence_group is not None else block.size
    group = create_groups(size, mpu)
    conversion = convert(model, block, group, sequence_group, world)
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) >= 2 or zero.get("overlap_comm"):
        _call_alike_on_every_rank(model)
    drop_parameters(optimizer, model_parameters, conversion.replaced)
    print_dist(str(conversion), ranks=[0])  # DeepSpeed's log hides what is below a warning
    return Activation(block, group, conversion)


def install() -> None:
    """Make plain `deepspeed.initialize` honour the block, also where it was imported by name before. Idempotent."""
    if is_installed():
        return
    original = DeepSpeedEngine.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def with_block(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        if given.get("model_parameters") is not None:
            given["model_parameters"] = list(given["model_parameters"])
        activation = prepare(
            given["model"],
            given["config_class"]._param_dict,
            mpu=given.get("mpu"),
            optimizer=given.get("optimizer"),
            model_parameters=given.get("model_parameters"),
            mesh=given.get("mesh_device") is not None,
        )
        original(*bound.args, **bound.kwargs)
        if activation is not None:
            activation.attach(self)

    with_block._ta_plugin = True  # type: ignore[attr-defined]
    DeepSpeedEngine.__init__ = with_block


def uninstall() -> None:
    """Undo `install`. Engines made meanwhile keep their block."""
    if is_installed():
        DeepSpeedEngine.__init__ = DeepSpeedEngine.__init__.__wrapped__


def is_installed() -> bool:
    """Whether plain `deepspeed.initialize` honours the block."""
    return getattr(DeepSpeedEngine.__init__, "_ta_plugin", False)


def _sequence_group(mpu: Any) -> SSPGroup:
    return SSPGroup(mpu.get_sequence_parallel_group(), device=accelerator_device())


def _call_alike_on_every_rank(model: nn.Module) -> None:
    """Make every rank call the same modules equally often, in one order.

    ZeRO-3 gathers a module's parameters when it is called; ZeRO-2, and 1 with overlap_comm, sum gradients in the order in which
    they become ready. Ranks that differ hang in the first case, and train wrong without a word in the second.
    """
    for name, module in model.named_modules():
        if not isinstance(module, TokenizedAttention):
            continue
        module.projections.may_absorb = False  # otherwise each rank decides by its own number of rows
        if module.score is not None and any(True for _ in module.score.parameters()):
            raise ValueError(
                f"{name}.score has parameters and runs once per bucket of samples, which differs between ranks; use "
                "zero_optimization.stage 1 or 0 without overlap_comm, or a score without parameters"
            )


def _refuse(block: TokenizedAttentionConfig, config: dict[str, Any], mpu: Any, mesh: bool) -> None:
    """Combinations that would train something else than asked for, silently."""
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        raise ValueError(
            "tensor_parallel.autotp_size is set beside tokenized_attention; AutoTP makes its groups too late to lie beside: "
            "build the model with tensor-parallel layers and pass their mpu instead"
        )
    if mesh or {"sequence_parallel_size", "data_parallel_size"} <= config.keys():
        raise ValueError(
            "sequence_parallel_size and data_parallel_size (or mesh_param) are set beside tokenized_attention; dense parameters "
            "drift apart between sequence-parallel ranks that way: pass mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp "
            "after its initialize_sequence_parallel(size) instead"
        )
    fp16, zero = config.get("fp16", {}), config.get("zero_optimization", {})
    if fp16.get("enabled", False) is True and zero.get("stage", 0) == 0 and fp16.get("loss_scale", 0) != 1:
        # DeepSpeed 0.19.8: engine.backward scales the loss for its ZeRO optimizers only, the fp16 ones unscale all the same
        raise ValueError(
            "fp16 is enabled at zero_optimization.stage 0, where DeepSpeed divides gradients by a loss scale that it never multiplied "
            "the loss with; use stage 1, 2 or 3, bf16, or a fixed fp16.loss_scale of 1"
        )
    if block.layout == "sequence" and not hasattr(mpu, "get_sequence_parallel_group"):
        raise ValueError(
            f'{BLOCK}.layout is "sequence", but there is no sequence-parallel group; pass an mpu that has one, such as '
            "deepspeed.runtime.sequence_parallel.parallel_state_sp"
        )
