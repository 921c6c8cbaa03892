"""Row optimizers against torch's on one tensor, and against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ta_plugin.row_optimizers import SGD, Adagrad, LazyAdam, RowOptimizer, RowWiseAdagrad

ROWS, DIM = 6, 3
step_rows = st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS), min_size=1, max_size=5)

PAIRS: list[tuple[RowOptimizer, Any]] = [
    (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    (Adagrad(lr=0.2, eps=1e-8), lambda p: torch.optim.Adagrad(p, lr=0.2, eps=1e-8)),
    (
        LazyAdam(lr=0.05, betas=(0.8, 0.95), eps=1e-6),
        lambda p: torch.optim.SparseAdam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ),
]
ALL: list[RowOptimizer] = [*(ours for ours, _ in PAIRS), RowWiseAdagrad(lr=0.2, eps=1e-8)]


def start() -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(step: int, rows: int) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def name(x: Any) -> str | None:
    return type(x).__name__ if not callable(x) else ""


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=name)
@settings(max_examples=25)
@given(steps=step_rows)
def test_equals_torch_on_sparse_gradients(ours: RowOptimizer, theirs: Any, steps: list[list[int]]) -> None:
    weight, parameter = start(), nn.Parameter(start())
    state, optimizer = ours.init_state(weight), theirs([parameter])
    for step, touched in enumerate(steps, 1):
        rows, grad = torch.tensor(touched, dtype=torch.int64), gradient(step, len(touched))
        ours.update(weight, state, rows, grad, step)
        parameter.grad = torch.sparse_coo_tensor(rows[None], grad, (ROWS, DIM))
        optimizer.step()
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-12)


def test_row_wise_adagrad_follows_its_formula() -> None:
    optimizer, weight = RowWiseAdagrad(lr=0.2, eps=1e-3), start()
    state, expected, sums = optimizer.init_state(weight), start(), [0.0] * ROWS
    assert state["sum"].shape == (ROWS,)
    for step, touched in enumerate([[0, 2], [2, 5, 1], [], [2]], 1):
        grad = gradient(step, len(touched))
        optimizer.update(weight, state, torch.tensor(touched, dtype=torch.int64), grad, step)
        for g, row in zip(grad, touched, strict=True):
            sums[row] += float(g.square().sum()) / DIM
            expected[row] -= 0.2 * g / (sums[row] ** 0.5 + 1e-3)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state["sum"], torch.tensor(sums, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ALL, ids=name)
def test_untouched_rows_and_their_state_stay(optimizer: RowOptimizer) -> None:
    weight = start()
    state = optimizer.init_state(weight)
    assert all(value.shape[0] == ROWS for value in state.values())
    optimizer.update(weight, state, torch.tensor([1, 4]), gradient(1, 2), 1)
    before = {key: value.clone() for key, value in state.items()}
    optimizer.update(weight, state, torch.tensor([4]), gradient(2, 1), 2)
    untouched = [0, 2, 3, 5]
    assert torch.equal(weight[untouched], start()[untouched])
    for key, value in state.items():
        assert not value[untouched].any()
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[4], before[key][4])


@pytest.mark.parametrize("optimizer", ALL, ids=name)
def test_the_learning_rate_may_change_between_steps(optimizer: RowOptimizer) -> None:
    moved = []
    usual = optimizer.lr
    for lr in (usual, usual / 2, 0.0):
        weight = start()
        optimizer.lr = lr
        optimizer.update(weight, optimizer.init_state(weight), torch.tensor([3]), gradient(1, 1), 1)
        moved.append((weight - start())[3])
    optimizer.lr = usual
    torch.testing.assert_close(moved[1] * 2, moved[0], rtol=1e-12, atol=0)
    assert not moved[2].any()
