"""Token-keyed layers inside Megatron's GPTModel: exact, causal, and the same under tensor parallelism and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layouts import Layout, config_of
from ranks import RankPool
from token_keyed_stack import (
    LENGTH,
    VOCAB,
    attention_against_formula,
    attention_over_context,
    batch,
    changed_by_the_future,
    losses_and_gradients,
    what_plans_refuse,
)

from ta_plugin.megatron import get_token_keyed_block_spec, plan_causal
from ta_plugin.megatron.token_keyed import TokenKeyedSelfAttention, chunks_of

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("decay", ["none", "alibi", "learned"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_the_formula(megatron_ranks: Pools, decay: str, packed: bool) -> None:
    for got, want in megatron_ranks(1).run(attention_against_formula, decay, packed)[0]:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("every", [1, 2])
def test_no_position_sees_the_future(megatron_ranks: Pools, every: int) -> None:
    difference = megatron_ranks(1).run(changed_by_the_future, every, "learned")[0]
    assert (difference[:, : LENGTH - 7] < 1e-12).all()
    assert (difference[:, LENGTH - 7 :] > 1e-6).all()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(recompute="full"),
        Layout(tp=2, sequence_parallel=True, recompute="full"),
        Layout(cp=2),
        Layout(tp=2, cp=2, sequence_parallel=True, recompute="full"),
    ],
    ids=["tp2", "tp2-sp", "full-recompute", "tp2-sp-full-recompute", "cp2", "tp2-sp-cp2-full-recompute"],
)
def test_layouts_agree(megatron_ranks: Pools, layout: Layout) -> None:
    ranks = megatron_ranks(layout.tp * layout.cp if layout.cp > 1 else 2)
    losses, gradients = ranks.run(losses_and_gradients, Layout(), 2)[0]
    for mine, my_gradients in ranks.run(losses_and_gradients, layout, 2):
        torch.testing.assert_close(mine, losses, rtol=1e-6, atol=1e-6)  # Megatron's cross-entropy is float32
        assert my_gradients.keys() == gradients.keys()
        for name, want in gradients.items():
            torch.testing.assert_close(my_gradients[name], want, rtol=1e-5, atol=1e-7, msg=name)


def test_attention_over_context_parallel_ranks_equals_one_rank(megatron_ranks: Pools) -> None:
    for pairs in megatron_ranks(2).run(attention_over_context):
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_wrong_plan_on_one_context_parallel_rank_raises_on_both(megatron_ranks: Pools) -> None:
    first, second = megatron_ranks(2).run(what_plans_refuse)
    assert first == second and all(message.startswith("rank 1 of 2: ") for message in first[:5])
    says = (
        "a multiple of 4",
        "in [0, 20]",
        "with B = 2 or lengths",
        "whole row, 20",
        "chunk is 0",
        "of context parallel size 1",
    )
    for message, part in zip(first, says, strict=True):
        assert part in message


def test_refusals() -> None:
    tokens, _ = batch()
    config = config_of(Layout())
    for every in (0, config.num_layers + 1):  # none of the layers would be token-keyed
        with pytest.raises(
            ValueError, match=rf"every is {every}; pass 1 \(all layers\) to {config.num_layers} \(the last\)"
        ):
            get_token_keyed_block_spec(config, VOCAB, every=every)
    with pytest.raises(ValueError, match="cu_seqlens"):
        plan_causal(tokens, config, cu_seqlens=torch.tensor([0, 2 * LENGTH]))
    with pytest.raises(ValueError, match="without its plan"):
        chunks_of(None)


def test_dropout_is_refused(megatron_ranks: Pools) -> None:
    with pytest.raises(AssertionError, match=r"attention_dropout is 0\.1"):
        megatron_ranks(1).run(build_with_dropout)


def build_with_dropout() -> None:
    from layouts import megatron

    with megatron(Layout()):
        TokenKeyedSelfAttention(replace(config_of(Layout()), attention_dropout=0.1), vocab_size=VOCAB)
