"""The block: what is wrong in it is named, on every rank; what is off leaves DeepSpeed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import DENSE_RATE, Setup, build_engine, build_models, train_dense, train_engine
from torch import nn


def message_of(block: dict[str, Any], key: str = "tokenized_attention", extra: dict[str, Any] | None = None) -> str:
    """What `initialize` says about a config on this rank."""
    from ta_plugin.deepspeed import initialize

    model, _ = build_models()
    config = {**Setup(size=None).config(), key: block, **(extra or {})}
    with pytest.raises(ValueError) as caught:
        initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=DENSE_RATE), config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("block", "key", "expected"),
    [
        ({"size": 2}, "tokenised_attention", "'tokenised_attention'; did you mean 'tokenized_attention'"),
        ({"size": 3}, "tokenized_attention", "tokenized_attention.size is 3, which does not divide the 4"),
        ({"sise": 2}, "tokenized_attention", "tokenized_attention.sise is no known key; did you mean 'size'"),
        ({"size": "two"}, "tokenized_attention", "tokenized_attention.size is 'two'"),
        ({"size": 0}, "tokenized_attention", "tokenized_attention.size is 0"),
        ({"row_multiple": 0}, "tokenized_attention", "tokenized_attention.row_multiple is 0"),
        ({"strategy": "circle"}, "tokenized_attention", "tokenized_attention.strategy is 'circle'"),
        ({"backend": "sdap"}, "tokenized_attention", "tokenized_attention.backend: backend is 'sdap'"),
        ({"optimizer": {"typ": "sgd"}}, "tokenized_attention", "optimizer.typ is no known key; did you mean 'type'"),
        (
            {"optimizer": {"type": "lazy_adam", "betas": [0.9, 1.0]}},
            "tokenized_attention",
            "tokenized_attention.optimizer.betas.1 is 1.0: input should be less than 1",
        ),
        ({"optimizer": "adam"}, "tokenized_attention", "optimizer is 'adam'; write an object of options"),
        (
            {"embeddings": ["tok*"]},
            "tokenized_attention",
            "embeddings has 'tok*', which matches no embedding; the model has",
        ),
        ({"modules": ["*"]}, "tokenized_attention", "tokenized_attention.tokens is not set"),
        ({"layout": "sequence"}, "tokenized_attention", "there is no sequence-parallel group"),
    ],
)
def test_a_wrong_block_is_an_error_on_every_rank(
    engines_on: Any, block: dict[str, Any], key: str, expected: str
) -> None:
    messages = engines_on(4).run(message_of, block, key)
    assert all(expected in message for message in messages), messages


def message_of_one_wrong_rank() -> str:
    return message_of({"size": 3 if dist.get_rank() == 2 else 2})


def message_of_one_typo() -> str:
    return message_of({"size": 2}, "tokenised_attention" if dist.get_rank() == 1 else "tokenized_attention")


def test_ranks_with_other_configs_all_raise(engines_on: Any) -> None:
    assert all("differs from rank 0's" in message for message in engines_on(4).run(message_of_one_wrong_rank))
    assert all("rank 1 of 4: the DeepSpeed config" in message for message in engines_on(4).run(message_of_one_typo))


@pytest.mark.parametrize(
    "extra",
    [{"tensor_parallel": {"autotp_size": 2}}, {"sequence_parallel_size": 2, "data_parallel_size": 2}],
    ids=["autotp", "mesh"],
)
def test_what_would_train_wrong_is_refused(engines_on: Any, extra: dict[str, Any]) -> None:
    messages = engines_on(4).run(message_of, {"size": 2}, "tokenized_attention", extra)
    assert all("beside tokenized_attention" in message for message in messages)


def test_fp16_without_zero_is_refused(engines_on: Any) -> None:
    messages = engines_on(2).run(message_of, {"size": 2}, "tokenized_attention", {"fp16": {"enabled": True}})
    assert all("fp16 is enabled at zero_optimization.stage 0" in message for message in messages)


def methods_of(engine: Any) -> set[str]:
    return {name for name in vars(engine) if callable(getattr(type(engine), name, None))}


def off_is_deepspeed_untouched() -> None:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ta_plugin.deepspeed import initialize, is_installed

    before = dict(vars(DeepSpeedEngine))
    losses = []
    for start, block in ((deepspeed.initialize, None), (initialize, None), (initialize, {"enabled": False, "size": 2})):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        config = Setup(size=None, stage=1).config() | ({} if block is None else {"tokenized_attention": block})
        engine = start(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config)[0]
        assert not hasattr(engine, "tokenized_attention")
        assert methods_of(engine) == set()
        values = []
        for step in range(3):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
            loss = engine(x).square().mean()
            engine.backward(loss)
            engine.step()
            values.append(loss.item())
        losses.append(values)
        engine.destroy()
    assert losses[0] == losses[1] == losses[2]
    assert dict(vars(DeepSpeedEngine)) == before and not is_installed()


def test_off_is_deepspeed_untouched(engines_on: Any) -> None:
    engines_on(2).run(off_is_deepspeed_untouched)


def two_engines() -> None:
    """Trained in turn with blocks that differ, each engine gives what it gives alone."""
    setups = Setup(size=4, steps=1), Setup(size=1, stage=2, strategy="gather", clip=0.2, steps=1)
    pairs = [build_models() for _ in setups]
    engines = [build_engine(model, setup) for (model, _), setup in zip(pairs, setups, strict=True)]
    losses: list[list[float]] = [[], []]
    for step in range(4):
        for mine, engine, setup in zip(losses, engines, setups, strict=True):
            mine += train_engine(engine, setup, first=step)
    for mine, (_, dense), setup in zip(losses, pairs, setups, strict=True):
        expected = train_dense(dense, Setup(clip=setup.clip, steps=4), world=dist.get_world_size())
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
    assert [engine.tokenized_attention.group.size for engine in engines] == [4, 1]
    for engine in engines:
        engine.destroy()


def test_two_engines_do_not_disturb_each_other(engines_on: Any) -> None:
    engines_on(4).run(two_engines)


def installed_then_plain() -> None:
    from deepspeed import initialize
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ta_plugin.deepspeed import install, is_installed, uninstall

    original = DeepSpeedEngine.__init__
    install()
    install()
    try:
        setup = Setup(stage=2, clip=0.1, steps=4)
        model, dense = build_models()
        embedding = dense.attention.embedding_fn
        optimizer = torch.optim.AdamW(model.parameters(), lr=DENSE_RATE)
        engine = initialize(model=model, optimizer=optimizer, config=setup.config())[0]
        expected = train_dense(dense, setup, world=dist.get_world_size())
        torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=1e-5)
        assert engine.tokenized_attention.group.size == 2 and embedding is dense.attention.embedding_fn
        engine.destroy()
        # our own initialize on top: the block is honoured once
        model, dense = build_models()
        engine = build_engine(model, setup)
        expected = train_dense(dense, setup, world=dist.get_world_size())
        torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=1e-5)
        engine.destroy()
    finally:
        uninstall()
    assert DeepSpeedEngine.__init__ is original and not is_installed()


def test_install_makes_plain_initialize_honour_the_block(engines_on: Any) -> None:
    engines_on(4).run(installed_then_plain)


def config_from(folder: str) -> None:
    import json
    from argparse import Namespace
    from pathlib import Path

    from ta_plugin.deepspeed import initialize

    path = Path(folder) / f"ds_config_{dist.get_rank()}.json"
    path.write_text(json.dumps(Setup(size=2).config()))
    for given in ({"config": str(path)}, {"args": Namespace(deepspeed_config=str(path), local_rank=-1)}):
        model, _ = build_models()
        if "args" in given:
            given["args"].local_rank = dist.get_rank()
        optimizer = torch.optim.AdamW(model.parameters(), lr=DENSE_RATE)
        engine, wrapped, loader, schedule = initialize(model=model, optimizer=optimizer, **given)
        assert engine.tokenized_attention.config.size == 2
        assert wrapped is not None and loader is None and schedule is None
        engine.destroy()


def test_config_from_a_file_and_from_args(engines_on: Any, tmp_path: Any) -> None:
    engines_on(2).run(config_from, str(tmp_path))
