"""Rows rounded up to a multiple: shapes repeat, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention, UniqueSpace
from ta_plugin.attention import Scoring, self_attention
from ta_plugin.models.encoder import HistoryEncoder

BATCH, LENGTH, VOCAB, DIM, HEADS = 3, 9, 6, 8, 2


def batch(seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator), torch.tensor(lengths)


def encoded(multiple: int, tokens: Tensor, lengths: Tensor) -> tuple[list[Tensor], list[int]]:
    """Output and every gradient of an attention whose `encode` runs a whole encoder, and how many rows that saw."""
    torch.manual_seed(1)
    table = ShardedTokenEmbedding(VOCAB, DIM, dtype=torch.float64)
    model = TokenizedAttention(BATCH, LENGTH, 1, table, num_heads=HEADS, row_multiple=multiple)
    encoder = HistoryEncoder(DIM, HEADS, 2, num_actions=3).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases and terms start at 0
    ages, actions = torch.rand(BATCH, LENGTH, dtype=torch.float64) * 1e4, torch.randint(0, 3, (BATCH, LENGTH))
    seen: list[int] = []

    def encode(rows: Tensor, space: UniqueSpace) -> Tensor:
        seen.append(rows.shape[0])
        assert rows.shape[0] == space.num_rows
        rows = F.normalize(rows, eps=0.0)  # NaN on a row of zeros
        return encoder(rows, space, ages, actions, lengths, model.scoring)

    out = model(tokens, lengths, encode=encode)
    (out.square().sum() + out.sum()).backward()
    rows, gradients = table._recorded[0]
    dense = torch.zeros(VOCAB, DIM, dtype=torch.float64).index_add_(0, rows, gradients)
    return [out, dense, *(p.grad for p in encoder.parameters())], seen


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, LENGTH), min_size=BATCH, max_size=BATCH),
    multiple=st.sampled_from([2, 3, 7, 64]),
)
def test_an_encoder_on_spare_rows_is_exact(seed: int, lengths: list[int], multiple: int) -> None:
    tokens, sizes = batch(seed, lengths)
    expected, plain = encoded(1, tokens, sizes)
    found, seen = encoded(multiple, tokens, sizes)
    assert seen[0] % multiple == 0 and 0 <= seen[0] - plain[0] < multiple
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "scoring", [Scoring(backend="reference"), Scoring(normaliser="none", activation=F.silu)], ids=["softmax", "silu"]
)
@pytest.mark.parametrize("terms", [False, True], ids=["counts", "terms"])
def test_all_distinct_tokens_beside_spare_rows(scoring: Scoring, terms: bool) -> None:
    """5 distinct tokens in 6 occurrences, rounded up to 6 rows: as many rows as occurrences, yet none may be taken for distinct."""
    tokens, lengths = torch.tensor([[4, 2, 9], [5, 5, 1]]), torch.tensor([3, 3])
    space = UniqueSpace.from_padded(tokens, lengths)
    larger = space.with_spare_rows(6)
    assert (space.num_rows, larger.num_rows, larger.num_occurrences) == (5, 6, 6)
    q, k, v = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sides: dict[str, Any] = {}
    if terms:
        sides["value_term"] = torch.randn(2, 3, 2, 4, dtype=torch.float64)
        sides["bias" if scoring.normaliser == "softmax" else "multiplier"] = torch.rand(2, 3, dtype=torch.float64)
    expected = self_attention(space, q, k, v, scoring=scoring, **sides)
    found = self_attention(larger, *(larger.fill_spare_rows(x) for x in (q, k, v)), scoring=scoring, **sides)
    torch.testing.assert_close(found[:5], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(larger.expand(found), space.expand(expected), rtol=0, atol=1e-13)


def test_folds_leave_spare_rows_empty() -> None:
    space = UniqueSpace.from_packed(torch.tensor([3, 3, 1]), torch.tensor([0, 3, 3]))
    larger = space.with_spare_rows(4)
    assert larger.cu_seqlens.tolist() == [0, 2, 4] and larger.counts.tolist() == [2, 1, 0, 0]
    values = torch.tensor([1.0, 2.0, 5.0])
    assert larger.fold(values, "sum").tolist() == [3.0, 5.0, 0.0, 0.0]
    assert larger.fold(values, "mean").tolist() == [1.5, 5.0, 0.0, 0.0]
    assert larger.fold(values, "logsumexp")[2:].tolist() == [-torch.inf] * 2
    assert larger.log_counts().tolist()[2:] == [-torch.inf] * 2  # type: ignore[union-attr]
    assert larger.with_spare_rows(2) is larger and space.with_spare_rows(1) is space


def test_no_samples_and_no_rows() -> None:
    nothing = UniqueSpace.from_padded(torch.zeros(0, 3).long(), torch.zeros(0).long())
    assert nothing.with_spare_rows(8) is nothing
    empty = UniqueSpace.from_padded(torch.zeros(2, 3).long(), torch.zeros(2).long())
    assert empty.with_spare_rows(8).num_rows == 0  # a multiple already


def test_a_wrong_multiple_is_named() -> None:
    with pytest.raises(ValueError, match="row_multiple is 0; pass 1 or more"):
        TokenizedAttention(1, 2, 1, nn.Embedding(3, 4), row_multiple=0)
