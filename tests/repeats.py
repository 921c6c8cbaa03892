"""One step on every rank against what is expected of it, and once more, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def check_step_twice(
    step: Callable[[], Tensor],
    expected: Tensor,
    coefficients: Tensor,
    parameters: dict[str, Tensor],
    expected_grads: dict[str, Tensor],
    sides: list[Tensor],
    expected_side_grads: list[Tensor],
    ranks: int,
) -> None:
    """`step()` and the gradients of (step() * coefficients).sum(), parameters' summed over ranks, within 1e-10; bitwise repeatable."""
    previous: list[Tensor] | None = None
    for _ in range(2):
        for x in (*parameters.values(), *sides):
            x.grad = None
        out = step()
        (out * coefficients).sum().backward()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        now = [out.detach()]
        for name, p in parameters.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            now.append(grad.clone())
            if ranks > 1:
                dist.all_reduce(grad)
            torch.testing.assert_close(
                grad, expected_grads[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
        for x, grad in zip(sides, expected_side_grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(x) if x.grad is None else x.grad, grad, rtol=0, atol=1e-10)
        if previous is not None:
            assert all(torch.equal(a, b) for a, b in zip(now, previous, strict=True)), "not bitwise repeatable"
        previous = now
