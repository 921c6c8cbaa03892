"""A Hugging Face encoder without positions attends over distinct tokens through our attention function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engines import VOCAB, Setup, build_engine

pytest.importorskip("transformers")


def encoder_equals_sdpa(named: bool) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False)
    model.embeddings.position_embeddings.weight.data.zero_()
    model.embeddings.position_embeddings.weight.requires_grad_(False)  # no positions: what makes it exact
    plain = copy.deepcopy(model)
    block = {"modules": ["encoder.layer.*.attention.self"], "tokens": "input_ids"}
    block |= {"lengths": "attention_mask"} if named else {}
    engine = build_engine(model, Setup(size=1, sgd=True, block=block))
    assert len(engine.tokenized_attention.conversion.changed) == 2, str(engine.tokenized_attention.conversion)
    ids = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    valid = mask.bool()
    ours = engine(input_ids=ids, attention_mask=mask).last_hidden_state[valid]
    expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state[valid]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    engine.backward(ours.square().sum())
    expected.square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    engine.destroy()


@pytest.mark.parametrize("named", [True, False], ids=["", "lengths not named"])
def test_an_encoder_equals_sdpa(engines_on: Any, named: bool) -> None:
    engines_on(2).run(encoder_equals_sdpa, named)
