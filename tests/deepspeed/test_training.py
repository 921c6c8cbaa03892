"""Sharded rows train as in the dense model, at every ZeRO stage and SSP size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import (
    PART,
    SIZES,
    WORLD,
    Model,
    Setup,
    batch,
    build_engine,
    build_models,
    dense_loss,
    dense_optimizers,
    gathered,
    train_dense,
    train_engine,
)
from torch import nn


def equals_dense(setup: Setup) -> None:
    model, dense = build_models(setup.sgd)
    engine = build_engine(model, setup)
    expected = train_dense(dense, setup, world=dist.get_world_size())
    losses = train_engine(engine, setup)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-2, "nothing was learnt: the comparison would not see a wrong update"
    table = model.attention.embedding_fn
    torch.testing.assert_close(table.to_dense(), dense.attention.embedding_fn.weight.detach(), rtol=0, atol=1e-5)
    names = dict(dense.named_parameters())
    with gathered(model, setup.stage):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, names[name], rtol=0, atol=1e-5)
    engine.destroy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_equal_the_dense_models(engines_on: Any, stage: int, size: int) -> None:
    engines_on(WORLD).run(equals_dense, Setup(stage=stage, size=size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_clipping_and_accumulation(engines_on: Any, stage: int, size: int) -> None:
    engines_on(WORLD).run(
        equals_dense, Setup(stage=stage, size=size, clip=0.5, accumulate=2, strategy="gather", sgd=True)
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_have_the_dense_models_scale(engines_on: Any, stage: int) -> None:
    engines_on(WORLD).run(equals_dense, Setup(stage=stage, accumulate=2, sgd=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_the_optimizer_offloaded(engines_on: Any, stage: int) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    more = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    engines_on(WORLD).run(equals_dense, Setup(stage=stage, clip=0.5, accumulate=2, sgd=True, more=more))


def norm_counts_rows(setup: Setup) -> None:
    """The engine reports one norm over dense parameters and rows: that of the dense model."""
    model, dense = build_models()
    engine = build_engine(model, setup)
    train_engine(engine, setup)
    world = dist.get_world_size()
    for rank in range(world):
        (dense_loss(dense, *batch(0, rank)) / world).backward()
    expected = nn.utils.get_total_norm([p.grad for p in dense.parameters()])
    torch.testing.assert_close(float(engine.get_global_grad_norm()), float(expected), rtol=1e-5, atol=0)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_engines_norm_is_the_dense_models(engines_on: Any, stage: int) -> None:
    engines_on(WORLD).run(norm_counts_rows, Setup(stage=stage, clip=1e3, steps=1))


def trains_in_bf16(setup: Setup, absorbs: bool = False) -> None:
    model, dense = build_models()
    engine = build_engine(model, setup)
    if absorbs:  # as it would at larger sizes
        model.attention.projections.absorption_pays = lambda *sizes: True
    expected = train_dense(dense, setup, world=dist.get_world_size())
    losses = train_engine(engine, setup)
    assert model.attention.embedding_fn.rows.dtype == torch.float32
    assert next(model.head.parameters()).dtype == torch.bfloat16
    # DeepSpeed's own stage 0 moves bf16 weights by 0.8 of the AdamW step, with or without the plugin
    torch.testing.assert_close(losses, expected, rtol=0, atol=0.15 if setup.stage == 0 else 0.05)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_the_dense_model(engines_on: Any, stage: int) -> None:
    engines_on(WORLD).run(trains_in_bf16, Setup(stage=stage, bf16=True, clip=0.5))


@pytest.mark.parametrize(("size", "absorbs"), [(1, False), (1, True), (PART, True)])
def test_bf16_reads_no_row_in_place_that_is_of_another_dtype(engines_on: Any, size: int, absorbs: bool) -> None:
    engines_on(WORLD).run(trains_in_bf16, Setup(stage=1, size=size, bf16=True, clip=0.5), absorbs)


def bf16_with_fp32_accumulation() -> None:
    from ta_plugin.deepspeed import initialize

    setup = Setup(stage=1, bf16=True, clip=0.1)
    model, dense = build_models()
    config = {**setup.config(), "data_types": {"grad_accum_dtype": "fp32"}}
    engine = initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config)[0]
    assert type(engine.optimizer).__name__ == "BF16_Optimizer"
    expected = train_dense(dense, setup, world=dist.get_world_size())
    torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=0.05)
    engine.destroy()


def test_bf16_with_fp32_accumulation(engines_on: Any) -> None:
    engines_on(WORLD).run(bf16_with_fp32_accumulation)


def skips_with_the_engine(stage: int) -> None:
    """A step that the engine discards leaves the rows, their optimizer state and the next step untouched."""
    setup = Setup(stage=stage, steps=1)
    model, _ = build_models()
    engine = build_engine(model, setup)
    table = model.attention.embedding_fn
    train_engine(engine, setup)
    before = [table.rows.clone(), *(value.clone() for value in table.state.values())]
    tokens, lengths, targets, labels = batch(1, dist.get_rank())
    labels = labels * float("inf") if dist.get_rank() == 1 else labels
    engine.backward(engine(tokens, lengths, targets, labels))
    engine.step()
    assert not engine.was_step_applied()
    for value, old in zip((table.rows, *table.state.values()), before, strict=True):
        assert torch.equal(value, old)
    assert int(table.steps) == 1
    train_engine(engine, setup, first=2)
    assert int(table.steps) == 2
    assert torch.isfinite(table.rows).all()
    engine.destroy()


def test_a_skipped_step_skips_the_rows(engines_on: Any) -> None:
    engines_on(WORLD).run(skips_with_the_engine, 3)  # the stage that checks for overflow in float32 too


@contextlib.contextmanager
def fp16_on_any_cpu() -> Iterator[None]:
    """DeepSpeed asks for fast instructions; torch computes in fp16 without them."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def trains_in_fp16(stage: int, scaling: dict[str, Any], overflow_at: int) -> None:
    """Steps that overflow skip the rows too, and what is applied follows the dense model."""
    fp16 = {"fp16": {"enabled": True, **scaling}}
    setup = Setup(stage=stage, clip=0.3, sgd=True, more=fp16)
    model, dense = build_models(sgd=True)
    table, references = model.attention.embedding_fn, dense_optimizers(dense, sgd=True)
    losses, expected, skipped = [], [], 0
    with fp16_on_any_cpu():
        engine = build_engine(model, setup)
        for step in range(14):
            before = table.rows.clone()
            tokens, lengths, targets, labels = batch(step, dist.get_rank())
            infinite = step == overflow_at and dist.get_rank() == 1
            loss = engine(tokens, lengths, targets, labels * float("inf") if infinite else labels)
            engine.backward(loss)
            engine.step()
            if not engine.was_step_applied():
                assert torch.equal(table.rows, before)
                skipped += 1
                continue
            dist.all_reduce(loss.detach())
            losses.append(float(loss) / dist.get_world_size())
            one = Setup(steps=1, clip=setup.clip)
            expected += train_dense(dense, one, dist.get_world_size(), first=step, optimizers=references)
        engine.destroy()
    assert 1 <= skipped <= 10 and engine.skipped_steps == skipped and int(table.steps) == 14 - skipped
    torch.testing.assert_close(losses, expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(table.to_dense(), dense.attention.embedding_fn.weight.detach(), rtol=0, atol=5e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_with_steps_that_overflow(engines_on: Any, stage: int) -> None:
    dynamic = {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}
    engines_on(2).run(trains_in_fp16, stage, dynamic, -1)


def test_fp16_without_zero(engines_on: Any) -> None:
    engines_on(2).run(trains_in_fp16, 0, {"loss_scale": 1}, 3)  # other scales are refused there


def forgets_on_zero_grad(stage: int) -> None:
    """What the user's engine.zero_grad() drops, the rows drop with it."""
    setup = Setup(stage=stage, sgd=True, steps=3)
    model, dense = build_models(sgd=True)
    engine = build_engine(model, setup)
    engine.backward(engine(*batch(7, dist.get_rank())))
    engine.zero_grad()
    engine.optimizer.zero_grad()  # gradients that a ZeRO optimizer has taken over already
    expected = train_dense(dense, setup, world=dist.get_world_size())
    torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=1e-5)
    engine.destroy()


def test_zero_grad_forgets_recorded_rows(engines_on: Any) -> None:
    engines_on(2).run(forgets_on_zero_grad, 0)


def row_rate_follows_schedule() -> None:
    from ta_plugin.deepspeed import initialize

    setup = Setup(steps=3, block={"optimizer": {"type": "sgd"}})
    model, _ = build_models()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    engine = initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=setup.config())[0]
    rates = []
    for step in range(3):
        train_engine(engine, Setup(steps=1), first=step)
        rates.append(model.attention.embedding_fn.optimizer.lr)
    assert rates == [0.5, 0.25, 0.125]
    engine.destroy()


def test_row_rate_follows_the_engines_schedule(engines_on: Any) -> None:
    engines_on(2).run(row_rate_follows_schedule)


def embedding_is_sharded(stage: int) -> None:
    """An nn.Embedding becomes a sharded table; the optimizer that held its weight trains without it."""
    _, dense = build_models()
    setup = Setup(stage=stage, steps=5, block={"optimizer": {"type": "adagrad", "lr": 0.1, "eps": 1e-10}})
    weight = dense.attention.embedding_fn.weight.detach().clone()
    plain = Model(nn.Embedding.from_pretrained(weight, freeze=False))
    plain.load_state_dict(dense.state_dict())
    engine = build_engine(plain, setup)
    expected = train_dense(dense, setup, world=dist.get_world_size())
    torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=1e-5)
    assert type(plain.attention.embedding_fn).__name__ == "ShardedTokenEmbedding"
    assert not any("embedding_fn" in name for name, _ in plain.named_parameters())
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_embedding_is_sharded(engines_on: Any, stage: int) -> None:
    engines_on(WORLD).run(embedding_is_sharded, stage)
