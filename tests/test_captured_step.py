"""CapturedStep: replays give what the step itself gives on every batch, gradients of parameters and of table rows included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ta_plugin import CapturedStep, ShardedTokenEmbedding, SSPGroup, TokenizedAttention

B, L, T, V, D = 5, 40, 3, 500, 32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def build(
    device: str, dtype: torch.dtype, row_bound: int | None, id_bound: int | None = None
) -> tuple[TokenizedAttention, ShardedTokenEmbedding, Callable[..., Tensor]]:
    """A model, its table and the step to capture."""
    torch.manual_seed(1)
    table = ShardedTokenEmbedding(V, D, device=device, dtype=dtype)
    maps = {name: nn.Linear(D, D, device=device, dtype=dtype) for name in ("query", "key", "value")}
    group = SSPGroup(None, device=device)
    model = TokenizedAttention(
        B,
        L,
        1,
        table,
        group=group,
        num_heads=2,
        strategy="owner",
        row_bound=row_bound,
        id_bound=id_bound or row_bound,
        **maps,
    )

    def step(tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        out = model(tokens, lengths, targets=targets)
        loss = out.float().square().sum() + out.float().sum()
        loss.backward()
        return torch.cat([out.detach().float().flatten(), loss.detach().reshape(1)])

    return model, table, step


def batch(seed: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, L + 1, (B,), generator=g)
    grids = (torch.randint(0, V, (B, n), generator=g) for n in (L, T))
    tokens, targets = (x.to(device) for x in grids)
    return [tokens, lengths.to(device), targets]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_replays_equal_the_step(device: str, dtype: torch.dtype) -> None:
    eager, eager_table, step = build(device, dtype, None)
    model, table, bounded = build(device, dtype, B * L)
    captured = CapturedStep(bounded, [model], batch(0, device))
    for seed in range(1, 5):  # the rows of the last step are trained on
        inputs = batch(seed, device)
        eager.zero_grad()
        model.zero_grad()  # gradients set to None come back
        expected, found = step(*inputs), captured(*inputs)
        assert torch.equal(found, expected)
        for ours, exact in zip(model.parameters(), eager.parameters(), strict=True):
            assert ours.grad is not None and torch.equal(ours.grad, exact.grad)
        for each in (table, eager_table):
            each.step()
        assert torch.equal(table.rows, eager_table.rows)
    model.check_bounds()


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_leaves_its_own_gradients_and_refuses_to_add_to_those_of_a_table(device: str) -> None:
    model, table, bounded = build(device, torch.float32, B * L)
    captured = CapturedStep(bounded, [model], batch(0, device))
    captured(*batch(1, device))
    with pytest.raises(RuntimeError, match="still holds the gradients of the last call"):
        captured(*batch(2, device))
    table.step()  # the dense ones stay
    captured(*batch(2, device))
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    table.zero_grad()
    bounded(*batch(2, device))
    assert len(found) == 6 and all(map(torch.equal, found, (p.grad for p in model.parameters())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_that_does_not_fit_gives_nan_and_is_reported() -> None:
    model, table, bounded = build("cuda", torch.float32, 30)
    captured = CapturedStep(bounded, [model], batch(0, "cuda"))
    tokens, _, targets = batch(1, "cuda")
    full, short = (torch.full((B,), n, device="cuda") for n in (L, 3))
    assert bool(captured(tokens, full, targets).isnan().all())
    table.zero_grad()
    assert bool(captured(tokens, short, targets).isfinite().all())
    with pytest.raises(ValueError, match=r"distinct rows of a batch reached \d+, outside \[0, 30\]"):
        model.check_bounds()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_with_too_many_ids_leaves_their_gradients_out_and_the_next_gives_nan() -> None:
    model, table, bounded = build("cuda", torch.bfloat16, B * L, 40)
    tokens, lengths, targets = batch(1, "cuda")
    lengths.fill_(L)
    captured = CapturedStep(bounded, [model], [tokens % 20, lengths, targets % 7])
    assert bool(captured(tokens, lengths, targets % 7).isfinite().all())
    (_, _), (_, of_keys) = sorted(table.take_recorded(), key=lambda pair: pair[0].numel())
    assert not of_keys.any()
    assert bool(captured(tokens % 20, lengths, targets % 7).isnan().all())
    table.zero_grad()
    with pytest.raises(ValueError, match=r"distinct ids of a batch reached \d+, outside \[0, 40\]"):
        model.check_bounds()
    assert bool(captured(tokens % 20, lengths, targets % 7).isfinite().all())
    assert all(bool(grad.isfinite().all()) for _, grad in table.take_recorded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_are_not_overwritten_before_they_are_applied() -> None:
    model, table, bounded = build("cuda", torch.float32, B * L)
    captured = CapturedStep(bounded, [model], batch(0, "cuda"))
    captured(*batch(1, "cuda"))
    with pytest.raises(RuntimeError, match=r"run its step\(\) or zero_grad\(\) first"):
        captured(*batch(2, "cuda"))
    table.step()
    captured(*batch(2, "cuda"))


@pytest.mark.parametrize("device", DEVICES)
def test_other_shapes_are_named(device: str) -> None:
    model, _, bounded = build(device, torch.float32, B * L)
    captured = CapturedStep(bounded, [model], batch(0, device))
    tokens, lengths, targets = batch(1, device)
    with pytest.raises(ValueError, match="pass the shapes and dtypes that were captured"):
        captured(tokens[:, 1:], lengths, targets)


def test_a_step_is_warmed_up() -> None:
    model, _, bounded = build("cpu", torch.float32, B * L)
    with pytest.raises(ValueError, match="warm_up is 0; pass 1 or more"):
        CapturedStep(bounded, [model], batch(0, "cpu"), warm_up=0)
