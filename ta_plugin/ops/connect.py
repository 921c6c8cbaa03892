"""Keeping a result in the autograd graph of tensors that happened to contribute nothing to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def connect(result: Tensor, *sources: Tensor | None) -> Tensor:
    """`result` unchanged, with zero gradients to every source.

    On a rank without rows or queries the backward of the collectives behind the sources must still run.
    """
    return _Connect.apply(result, *[s for s in sources if s is not None and s.is_floating_point()])


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        ctx.like = [(s.shape, s.dtype, s.device) for s in sources]
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
