"""Update rules for the touched rows of an embedding table; untouched rows and their state stay as they are.

Each rule holds its hyper-parameters (`lr` may be changed between steps by a schedule); the table holds the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RowOptimizer(Protocol):
    """What `ShardedTokenEmbedding` asks of an update rule."""

    lr: float

    def init_state(self, weight: Tensor) -> dict[str, Tensor]:
        """State tensors for weight (R, D); each has R as its first dimension."""
        ...

    def update(self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, step: int) -> None:
        """Apply in place the gradient (n, D) of distinct `rows` (n,) int64 at 1-based `step`."""
        ...


@dataclass
class SGD:
    """weight -= lr * grad. Equals torch.optim.SGD without momentum."""

    lr: float = 0.1

    def init_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def update(self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, step: int) -> None:
        weight.index_add_(0, rows, grad, alpha=-self.lr)


@dataclass
class Adagrad:
    """Element-wise Adagrad. Equals torch.optim.Adagrad without decay."""

    lr: float = 0.05
    eps: float = 1e-10

    def init_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": torch.zeros_like(weight)}

    def update(self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, step: int) -> None:
        total = state["sum"][rows] + grad.square()
        state["sum"][rows] = total
        weight.index_add_(0, rows, grad / (total.sqrt() + self.eps), alpha=-self.lr)


@dataclass
class RowWiseAdagrad:
    """Adagrad with one accumulator per row, the mean of the squared gradient over the row (FBGEMM's exact row-wise Adagrad)."""

    lr: float = 0.05
    eps: float = 1e-10

    def init_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"sum": weight.new_zeros(weight.shape[0])}

    def update(self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, step: int) -> None:
        total = state["sum"][rows] + grad.square().mean(1)
        state["sum"][rows] = total
        weight.index_add_(0, rows, grad / (total.sqrt() + self.eps)[:, None], alpha=-self.lr)


@dataclass
class LazyAdam:
    """Adam whose moments move only for touched rows. Equals torch.optim.SparseAdam."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def update(self, weight: Tensor, state: dict[str, Tensor], rows: Tensor, grad: Tensor, step: int) -> None:
        beta1, beta2 = self.betas
        mean = torch.lerp(state["exp_avg"][rows], grad, 1 - beta1)
        square = torch.lerp(state["exp_avg_sq"][rows], grad.square(), 1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        rate = self.lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        weight.index_add_(0, rows, mean / (square.sqrt() + self.eps), alpha=-rate)
