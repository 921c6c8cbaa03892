"""Every check of a batch names the argument, the value and the remedy, and lets good input pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ta_plugin.checks import check_cutoffs, check_lengths, check_queries, check_side, check_tokens

CPU = torch.device("cpu")
GOOD = torch.tensor([[1, 2, 3], [4, 5, 99]])
LENGTHS = torch.tensor([3, 2])


def message_of(check: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as error:
        check(*args, **kwargs)
    return str(error.value)


def tokens_message(tokens: Tensor, vocab: int | None = 10, lengths: Tensor | None = None, shape: Any = None) -> str:
    return message_of(check_tokens, "tokens", tokens, CPU, vocab, lengths, shape)


def test_what_lies_past_a_length_is_not_read() -> None:
    check_tokens("tokens", GOOD, CPU, 10, LENGTHS, (2, 3))
    check_tokens("tokens", GOOD.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-1)), CPU, 10, LENGTHS)
    assert "tokens[1, 2] is 99" in tokens_message(GOOD)


def test_a_vocabulary_of_none_skips_only_the_upper_check() -> None:
    check_tokens("tokens", GOOD * 2**40, CPU, None, None)
    assert "tokens[0, 0] is -1" in tokens_message(-GOOD.clamp(max=1), vocab=None)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_batches_without_slots_pass(shape: tuple[int, int]) -> None:
    check_tokens("tokens", torch.zeros(shape, dtype=torch.int64), CPU, 10, torch.zeros(shape[0], dtype=torch.int64))


def test_tokens() -> None:
    assert tokens_message(GOOD.int()) == "tokens is torch.int32; pass int64 (`tokens.long()`)"
    assert "tokens is torch.float32" in tokens_message(GOOD.float())
    assert "tokens has shape (6,); pass (batch_size, length)" in tokens_message(GOOD.flatten())
    assert "tokens has shape (2, 3), but batch_size and sequence_length are (4, 3)" in tokens_message(
        GOOD, 100, shape=(4, 3)
    )
    assert "is on meta" in tokens_message(GOOD.to("meta"))
    assert "vocab_size is 10; ids must lie below it" in tokens_message(GOOD)


def test_lengths() -> None:
    check_lengths("lengths", None, 2, 3, CPU)
    check_lengths("lengths", torch.tensor([0, 3]), 2, 3, CPU)
    for bad, expected in (
        (torch.tensor([0, 4]), "lengths[1] is 4; it must lie in [0, 3]"),
        (torch.tensor([-2, 3]), "lengths[0] is -2"),
        (torch.tensor([1]), "of shape (1,); pass int64 of shape (2,)"),
        (torch.tensor([1, 2]).int(), "lengths is torch.int32"),
        (torch.tensor([1.0, 2.0]), "lengths is torch.float32"),
        (torch.tensor([1, 2]).to("meta"), "lengths is on meta"),
    ):
        assert expected in message_of(check_lengths, "lengths", bad, 2, 3, CPU)


def test_cutoffs() -> None:
    check_cutoffs(None, GOOD, GOOD)
    check_cutoffs(torch.tensor([[-5, 0, 99]] * 2), GOOD, GOOD)
    assert "pass int64 of shape (2, 3)" in message_of(check_cutoffs, torch.zeros(2, 2).long(), GOOD, GOOD)
    assert "target_cutoffs is torch.float32" in message_of(check_cutoffs, torch.zeros(2, 3), GOOD, GOOD)


def test_queries() -> None:
    check_queries(torch.zeros(2, 3, 4), GOOD)
    assert "pass floating (B, T, E)" in message_of(check_queries, torch.zeros(2, 3), GOOD)
    assert "torch.int64" in message_of(check_queries, torch.zeros(2, 3, 4).long(), GOOD)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_biases_and_multipliers_that_fit(shape: tuple[int, ...]) -> None:
    check_side("bias", torch.zeros(shape), GOOD, {4})


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 2), (2, 3, 4, 1)])
def test_biases_and_multipliers_that_do_not_fit(shape: tuple[int, ...]) -> None:
    message = message_of(check_side, "bias", torch.zeros(shape), GOOD, {4})
    assert f"bias is torch.float32 of shape {shape}; pass floating (2, 3, 4) or (2, 3)" in message


def test_value_terms() -> None:
    for heads in (2, 4):
        check_side("value_term", torch.zeros(2, 3, heads, 5), GOOD, {2, 4}, trailing=1)
    for shape in ((2, 3), (2, 3, 4), (2, 3, 3, 5)):
        message = message_of(check_side, "value_term", torch.zeros(shape), GOOD, {2, 4}, trailing=1)
        assert "pass floating (2, 3, 2, Dv) or (2, 3, 4, Dv)" in message
    assert "torch.int64" in message_of(check_side, "bias", torch.zeros(2, 3).long(), GOOD, {4})
