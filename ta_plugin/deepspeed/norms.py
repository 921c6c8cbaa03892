"""Counting sharded rows in the engine's gradient norm, so that clipping sees one norm and an overflow skips one step.

Each of DeepSpeed's optimizers computes its norm in a place of its own. What is replaced is replaced on one instance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor

RowNorm = Callable[[], Tensor]  # norm of the rows' gradient, scaled like the engine's gradients; equal on every rank


def join_norm(engine: Any, row_norm: RowNorm) -> Callable[[], float]:
    """Make the norm that `engine` clips by include `row_norm()`; returns what gives the last step's norm, loss scale removed.

    Raises ValueError for an optimizer whose norm cannot be reached while clipping is on.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: _beside(norm_groups(), row_norm())
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        global_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: _combined(global_norm(norm_type), row_norm())
    elif isinstance(optimizer, BF16_Optimizer):
        _join_bf16(engine, optimizer, row_norm)
    elif isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        return _join_half(optimizer, row_norm)
    elif isinstance(optimizer, torch.optim.Optimizer) and engine.torch_autocast_z0_gradscaler is None:
        return _join_plain(engine, row_norm)
    elif engine.gradient_clipping() > 0.0:
        raise ValueError(
            f"gradient_clipping is {engine.gradient_clipping()}, but the norm of {type(optimizer).__name__} cannot count sharded "
            'rows; set "gradient_clipping": 0.0, or train with ZeRO or a plain optimizer'
        )
    return lambda: float(optimizer._global_grad_norm or 0.0)


def _beside(groups: list[Any], rows: Tensor) -> list[Any]:
    """The groups' norms and the rows', on one device: an offloaded optimizer's are on the CPU."""
    device = next((norm.device for norm in groups if torch.is_tensor(norm)), rows.device)
    return [*groups, rows.to(device)]


def _combined(dense: Tensor, rows: Tensor) -> Tensor:
    """One norm of two, on `dense`'s device; what DeepSpeed marks as invalid (-1 or not finite) stays invalid."""
    rows = rows.to(dense)
    invalid = ~torch.isfinite(dense) | (dense < 0) | ~torch.isfinite(rows)
    both = torch.hypot(dense, rows)
    return torch.where(invalid, torch.full_like(both, torch.inf), both)


def _join_plain(engine: Any, row_norm: RowNorm) -> Callable[[], float]:
    """Stage 0 in float32: the engine clips in place before it calls the optimizer."""
    last = [0.0]

    def clip() -> None:
        # an infinite bound leaves gradients as they are and still returns their norm
        parameters = list(engine.module.parameters())
        dense = clip_grad_norm_(parameters=parameters, max_norm=float("inf"), mpu=engine.mpu)
        total = _combined(dense.reshape(()), row_norm())
        coefficient = (engine.gradient_clipping() / (total + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(coefficient.to(parameter.grad))
        last[0] = float(total)
        engine._global_grad_norm = last[0]

    engine.clip_fp32_gradients = clip
    return lambda: last[0]


def _join_half(optimizer: Any, row_norm: RowNorm) -> Callable[[], float]:
    """Stage 0 in half precision: norm and overflow check are inside `step`, around one method each."""
    last = [0.0]
    unscale, checker = optimizer.unscale_and_clip_grads, optimizer.overflow_checker
    fused = isinstance(optimizer, FP16_Optimizer)

    def unscale_and_clip(*args: Any, **kwargs: Any) -> Any:
        position = 1 if fused else 0  # where total_norm stands
        total = _combined(torch.as_tensor(args[position], dtype=torch.float32), row_norm())
        last[0] = float(total) / optimizer.loss_scale_config.cur_scale
        return unscale(*args[:position], total, *args[position + 1 :], **kwargs)

    def or_rows(check: Callable[..., bool]) -> Callable[..., bool]:
        return lambda *args, **kwargs: check(*args, **kwargs) or not bool(torch.isfinite(row_norm()))

    optimizer.unscale_and_clip_grads = unscale_and_clip
    for name in ("has_overflow", "check", "check_using_norm"):
        setattr(checker, name, or_rows(getattr(checker, name)))
    return lambda: last[0]


def _join_bf16(engine: Any, optimizer: BF16_Optimizer, row_norm: RowNorm) -> None:
    """Stage 1 in bf16 with fp32 accumulation, and pipelines: one more entry among the gradients whose norm is taken."""
    grads_for_norm = optimizer.get_grads_for_norm

    def with_rows(for_clipping: bool = False) -> Any:
        if for_clipping:
            return grads_for_norm(for_clipping=True)
        dense, experts = grads_for_norm()
        if bwc_tensor_model_parallel_rank(mpu=engine.mpu) == 0 and _first_stage(engine):  # summed over both
            dense = [*dense, row_norm().reshape(1)]
        return dense, experts

    optimizer.get_grads_for_norm = with_rows


def _first_stage(engine: Any) -> bool:
    return not engine.pipeline_parallelism or engine.is_first_stage()
