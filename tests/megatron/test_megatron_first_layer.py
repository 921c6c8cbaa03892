"""The first causal layer of a stock model in unique space: equal to plain attention, gradients included, and on distinct keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import Layout, config_of, megatron
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from ranks import RankPool
from torch import Tensor

from ta_plugin.megatron import causal_layer_spec
from ta_plugin.megatron.first_layer import RepeatedKeyAttention, distinct_rows
from ta_plugin.megatron.layer_specs import stock_spec

pytestmark = pytest.mark.newest
LENGTH, VOCAB = 24, 16


def losses_and_gradients(spec: Any, rope: bool, length: int) -> tuple[Tensor, dict[str, Tensor], list[str], list[int]]:
    """A GPTModel as Megatron-LM builds it: losses, gradients, core attentions, and rows that attention was asked to hold."""
    free = [1, 0, 0, 0] if rope else None
    torch.manual_seed(3)
    config = config_of(Layout(), no_rope_freq=free)
    kind = "rope" if rope else "none"
    model = GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type=kind)
    tokens = torch.randint(0, VOCAB, (3, length))
    tokens[1] = tokens[1, 0]
    labels = torch.randint(0, VOCAB, tokens.shape)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    rows: list[int] = []
    kinds = [type(layer.self_attention.core_attention).__name__ for layer in model.decoder.layers]
    first = model.decoder.layers[0].self_attention.core_attention
    first.register_forward_hook(lambda _m, a, _o: rows.append(_held(a[1], a[2])))
    out = model(tokens, torch.arange(length)[None].expand(3, -1), mask, labels=labels)
    out.sum().backward()
    rows.append(sum(len(set(sample)) for sample in tokens.tolist()))
    return out.detach(), {n: p.grad for n, p in model.named_parameters()}, kinds, rows


def _held(key: Tensor, value: Tensor) -> int:
    k, v = (t.transpose(0, 1).flatten(0, 1) for t in (key, value))
    return distinct_rows(k, v, key.shape[1])[0].num_rows


def both(rope: bool, length: int) -> tuple[Any, Any]:
    with megatron(Layout()):
        return (
            losses_and_gradients(causal_layer_spec, rope, length),
            losses_and_gradients(stock_spec(None, False), rope, length),
        )


@pytest.mark.parametrize("length", [LENGTH, 1])
@pytest.mark.parametrize("rope", [True, False])
def test_equals_the_stock_layer(megatron_ranks: Callable[[int], RankPool], rope: bool, length: int) -> None:
    mine, stock = megatron_ranks(1).run(both, rope, length)[0]
    torch.testing.assert_close(mine[0], stock[0], atol=1e-5, rtol=1e-5)
    assert mine[1].keys() == stock[1].keys()
    for name, gradient in mine[1].items():
        torch.testing.assert_close(gradient, stock[1][name], atol=1e-5, rtol=1e-5, msg=name)
    assert mine[2] == ["RepeatedKeyAttention"] + ["DotProductAttention"] * 3
    held, distinct = mine[3]
    assert held == distinct < 3 * length or length == 1  # one key for each distinct token


def test_rows_that_share_a_hash_count_as_distinct(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = torch.randn(6, 1, 4), torch.randn(6, 1, 4)
    k[3], v[3] = k[1], v[1]
    space, first = distinct_rows(k, v, 2)
    assert space.num_rows == 6  # equal rows of different samples stay apart
    space, first = distinct_rows(k, v, 1)
    assert space.num_rows == 5 and first[space.inverse[3]] == 1
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.zeros(4, dtype=torch.int64))
    words = torch.zeros(6, 1, 4)
    words[:, 0, 0] = torch.tensor([1.0, 2, 1, 2, 3, 3])
    words[:, 0, 2] = torch.tensor([2.0, 1, 2, 1, 3, 3])  # with equal factors sums of words collide
    space, first = distinct_rows(words, torch.zeros(6, 1, 4), 1)
    assert space.num_rows == 6 and first.tolist() == list(range(6))


@pytest.mark.parametrize(
    "changes, options, said",
    [
        ({"attention_dropout": 0.1}, {}, "attention_dropout is 0.1"),
        ({}, {"attn_mask_type": AttnMaskType.padding}, "attn_mask_type is padding"),
        ({"context_parallel_size": 2}, {}, "context_parallel_size is 2"),
        ({"window_size": (8, 0)}, {}, "window_size"),
    ],
)
def test_refusals(changes: dict[str, Any], options: dict[str, Any], said: str) -> None:
    build = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | options
    with pytest.raises(ValueError, match=said):
        RepeatedKeyAttention(config=config_of(Layout(), **changes), **build)


def test_a_mask_between_documents_is_refused() -> None:
    layer = RepeatedKeyAttention(
        config=config_of(Layout()), layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
    )
    q, mask = torch.randn(4, 1, 2, 8), torch.ones(4, 4, dtype=torch.bool).triu(1)[None, None]
    assert layer(q, q, q, mask).shape == (4, 1, 16)
    mask[..., 2:, 0] = True
    with pytest.raises(ValueError, match="--reset-attention-mask"):
        layer(q, q, q, mask)


def test_layers_above_the_first_are_stock() -> None:
    core = causal_layer_spec.submodules.self_attention.submodules.core_attention
    assert core.stock is DotProductAttention
