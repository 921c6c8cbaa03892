"""Self-, cross- and target attention on distinct rows against attention over positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attention_over_positions
from torch import Tensor, nn

from ta_plugin import UniqueSpace
from ta_plugin.attention import Scoring, cross_attention, padded_target_attention, self_attention
from ta_plugin.attention.layers import PackedTargets

samples_of_tokens = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=4)
LENGTH, DIM = 7, 4


class Batch:
    """Random rows and side inputs of a padded batch; queries are T per sample."""

    def __init__(self, samples: list[list[int]], heads: int, kv_heads: int, per_head: bool, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        tokens = torch.tensor([s + [9] * (LENGTH - len(s)) for s in samples], dtype=torch.int64)
        self.lengths = torch.tensor([len(s) for s in samples])
        self.space = UniqueSpace.from_padded(tokens, self.lengths)
        self.batch, self.heads = len(samples), heads
        self.q = self.normal(self.space.num_rows, heads, DIM)
        self.k = self.normal(self.space.num_rows, kv_heads, DIM)
        self.v = self.normal(self.space.num_rows, kv_heads, DIM)
        side = [self.batch, LENGTH] + ([heads] if per_head else [])
        self.bias, self.multiplier = self.normal(*side), self.normal(*side)
        self.value_term = self.normal(self.batch, LENGTH, kv_heads, DIM)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).requires_grad_()

    def sides(self, scoring: Scoring, used: set[str]) -> dict[str, Tensor]:
        named = {"value_term": self.value_term}
        named |= {"bias": self.bias} if scoring.normaliser == "softmax" else {"multiplier": self.multiplier}
        return {name: x for name, x in named.items() if name in used}

    def occurrences(self, b: int, rows: Tensor) -> Tensor:
        bounds = self.space.cu_occurrences
        return rows[self.space.inverse[bounds[b] : bounds[b + 1]]]

    def by_positions(self, b: int, q: Tensor, scoring: Scoring, sides: dict[str, Tensor], **more: Any) -> Tensor:
        n = int(self.lengths[b])
        k, v = self.occurrences(b, self.k), self.occurrences(b, self.v)
        options = {name: x[b, :n] for name, x in sides.items()}
        return attention_over_positions(
            q, k, v, scale=scoring.scale, normaliser=scoring.normaliser, activation=scoring.activation,
            **options, **more,
        )  # fmt: skip

    def compare(self, got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        inputs = [self.q, self.k, self.v, self.bias, self.multiplier, self.value_term]
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
        if not want.requires_grad:
            return
        grads = [torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (got, want)]
        for x, mine, plain in zip(inputs, *grads, strict=True):
            zero = torch.zeros_like(x)
            torch.testing.assert_close(
                zero if mine is None else mine, zero if plain is None else plain, rtol=0, atol=1e-11
            )


SCORINGS = [Scoring(), Scoring(scale=0.3), Scoring(normaliser="none", activation=F.silu), Scoring(normaliser="none")]
batches = st.builds(
    lambda samples, heads, per_head, seed: Batch(samples, *heads, per_head, seed),
    samples_of_tokens,
    st.sampled_from([(1, 1), (2, 2), (4, 2)]),
    st.booleans(),
    st.integers(0, 99),
)
used_sides = st.sets(st.sampled_from(["bias", "multiplier", "value_term"]))


@settings(max_examples=40)
@given(batches, st.sampled_from(SCORINGS), used_sides)
def test_self_attention_of_rows_equals_every_position(batch: Batch, scoring: Scoring, used: set[str]) -> None:
    sides = batch.sides(scoring, used)
    out = self_attention(batch.space, batch.q, batch.k, batch.v, scoring=scoring, **sides)
    samples = range(batch.batch)
    want = [batch.by_positions(b, batch.occurrences(b, batch.q), scoring, sides) for b in samples]
    batch.compare(batch.space.as_packed().expand(out), torch.cat(want))


@settings(max_examples=40)
@given(batches, st.sampled_from(SCORINGS), used_sides, st.integers(0, 99))
def test_cross_attention_equals_every_position(batch: Batch, scoring: Scoring, used: set[str], seed: int) -> None:
    sides = batch.sides(scoring, used)
    counts = torch.randint(0, 4, (batch.batch,), generator=torch.Generator().manual_seed(seed))
    batch.q = batch.normal(int(counts.sum()), batch.heads, DIM)
    bounds = F.pad(counts.cumsum(0), (1, 0)).int()
    out, lse = cross_attention(batch.space, batch.q, bounds, batch.k, batch.v, scoring=scoring, **sides)
    pieces = batch.q.split(counts.tolist())
    want = [batch.by_positions(b, q, scoring, sides) for b, q in enumerate(pieces)]
    batch.compare(out, torch.cat(want))
    assert (lse is None) == (scoring.normaliser == "none")


@settings(max_examples=60)
@given(batches, st.sampled_from(SCORINGS), used_sides, st.integers(0, 3), st.booleans(), st.booleans(), st.booleans())
def test_target_attention_equals_every_position(
    batch: Batch, scoring: Scoring, used: set[str], width: int, short: bool, cutoffs: bool, own: bool
) -> None:
    sides = batch.sides(scoring, used)
    batch.q = batch.normal(batch.batch, width, batch.heads, DIM)
    own_rows = [batch.normal(batch.batch, width, batch.k.shape[1], DIM) for _ in range(2)]
    full = torch.full((batch.batch,), width)
    lengths = torch.randint(0, width + 1, (batch.batch,), generator=batch.generator) if short else full
    cutoff = torch.randint(-1, LENGTH + 2, (batch.batch, width), generator=batch.generator) if cutoffs else None
    out = padded_target_attention(
        batch.space, batch.q, batch.k, batch.v, lengths=lengths if short else None, cutoffs=cutoff,
        own=(own_rows[0], own_rows[1]) if own else None, scoring=scoring, **sides,
    )  # fmt: skip
    want = []
    for b, n in enumerate(lengths.tolist()):
        visible = None if cutoff is None else torch.arange(int(batch.lengths[b])) < cutoff[b, :n, None]
        mine = (own_rows[0][b, :n], own_rows[1][b, :n]) if own else None
        rows = batch.by_positions(b, batch.q[b, :n], scoring, sides, visible=visible, own=mine)
        want.append(F.pad(rows, (0, 0, 0, 0, 0, width - n)))
    batch.compare(out, torch.stack(want))


def test_an_absent_occurrence_counts_for_nothing() -> None:
    batch = Batch([[1, 2, 1, 3], [2, 2]], 2, 2, False, 0)
    with torch.no_grad():
        batch.bias[0, 2] = batch.bias[1, :] = -torch.inf  # one of two; all of a sample
    out = self_attention(batch.space, batch.q, batch.k, batch.v, bias=batch.bias, value_term=batch.value_term)
    keep = torch.tensor([0, 1, 3])
    rows = batch.space.inverse[keep]
    want = attention_over_positions(
        batch.q[:3], batch.k[rows], batch.v[rows], bias=batch.bias[0, keep], value_term=batch.value_term[0, keep]
    )
    torch.testing.assert_close(out[:3], want, rtol=0, atol=1e-12)
    assert not out[3].any()
    grads = torch.autograd.grad(out.sum(), [batch.q, batch.k, batch.v, batch.bias, batch.value_term])
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[4][0, 2].any()


def test_packed_targets_return_to_their_slots() -> None:
    lengths = torch.tensor([2, 0, 3])
    targets = PackedTargets(3, 3, lengths, torch.device("cpu"))
    grid = torch.arange(18.0).view(3, 3, 2)
    rows = targets.pack(grid)
    assert rows[:, 0].tolist() == [0, 2, 12, 14, 16]
    assert targets.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert targets.index.tolist() == [0, 1, 0, 1, 2]
    valid = (torch.arange(3) < lengths[:, None])[..., None]
    assert torch.equal(targets.unpack(rows), grid * valid)
    assert PackedTargets(2, 0, None, torch.device("cpu")).unpack(torch.zeros(0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"normaliser": "sigmoid"}, "pass 'softmax' or 'none'"),
        ({"activation": F.silu}, "activation is given with normaliser='softmax'"),
        ({"scale": 1.0, "score": nn.Identity()}, "scale inside the module"),
        ({"score": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))}, "BatchNorm1d"),
        ({"score": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))}, "Dropout"),
    ],
)
def test_scoring_that_would_not_be_exact_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError) as error:
        Scoring(**options)
    assert match in str(error.value)


def test_sides_that_would_not_be_exact_are_refused() -> None:
    batch = Batch([[1, 2, 1]], 1, 1, False, 0)
    rows = (batch.space, batch.q, batch.k, batch.v)
    with pytest.raises(ValueError, match="a bias inside a pointwise activation does not fold"):
        self_attention(*rows, bias=batch.bias, scoring=Scoring(normaliser="none", activation=F.silu))
    with pytest.raises(ValueError, match="pass its logarithm as bias"):
        self_attention(*rows, multiplier=batch.multiplier)
