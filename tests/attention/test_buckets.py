"""Ragged samples regrouped into padded batches: nothing lost, nothing mixed, nothing copied without need."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ta_plugin.attention.buckets import CPU_COST, Buckets, bucketize

lengths = st.one_of(st.integers(0, 4), st.integers(0, 300))
samples = st.lists(st.tuples(lengths, lengths), max_size=8)
Sizes = list[tuple[int, int]]


def buckets_of(sizes: Sizes) -> tuple[Buckets, Tensor, Tensor]:
    """The buckets, and for each query and key row its sample + 1."""
    q, k = torch.tensor([s[0] for s in sizes] or [0]), torch.tensor([s[1] for s in sizes] or [0])
    number = torch.arange(1, q.numel() + 1)
    zero = torch.zeros(1, dtype=torch.int64)
    bounds = (torch.cat([zero, x.cumsum(0)]).int() for x in (q, k))
    return bucketize(*bounds), number.repeat_interleave(q), number.repeat_interleave(k)


@given(samples)
def test_queries_and_keys_of_one_sample_meet_and_no_others(sizes: Sizes) -> None:
    buckets, of_query, of_key = buckets_of(sizes)
    seen: list[int] = []
    for (q_side, k_side), q_rows, k_rows in zip(
        buckets.sides, buckets.split_q(of_query), buckets.split_k(of_key), strict=True
    ):
        q, k = q_side.pad(q_rows), k_side.pad(k_rows)
        assert q.shape[0] == k.shape[0]
        for mine, keys, valid_q, valid_k in zip(q, k, q_side.valid(), k_side.valid(), strict=True):
            numbers = set(mine[valid_q].tolist()) | set(keys[valid_k].tolist())
            assert len(numbers) == 1
            b = numbers.pop()
            assert (int(valid_q.sum()), int(valid_k.sum())) == sizes[b - 1]
            assert not mine[~valid_q].any()  # zeros in the padding
            assert not keys[~valid_k].any()
            seen.append(b)
    assert sorted(seen) == [b for b, (q, k) in enumerate(sizes, 1) if q and k]


@given(samples)
def test_rows_return_to_their_places_and_keyless_queries_are_filled(sizes: Sizes) -> None:
    buckets, of_query, _ = buckets_of(sizes)
    if not buckets.sides:
        return
    rows = torch.arange(1.0, of_query.numel() + 1)
    sides = [q for q, _ in buckets.sides]
    pieces = [side.unpad(side.pad(x)) for side, x in zip(sides, buckets.split_q(rows), strict=True)]
    keyed = torch.tensor([k > 0 for _, k in sizes])[of_query - 1]
    assert torch.equal(buckets.join_q(pieces, -7.0), torch.where(keyed, rows, torch.tensor(-7.0)))


@given(samples)
def test_padding_costs_less_than_the_calls_it_saves(sizes: Sizes) -> None:
    buckets, _, _ = buckets_of(sizes)
    live = [(q, k) for q, k in sizes if q and k]
    computed = sum(q.num_samples * q.length * k.length for q, k in buckets.sides)
    saved = len(live) - len(buckets.sides)
    assert computed - sum(q * k for q, k in live) <= CPU_COST.call * saved


def test_equal_lengths_are_one_batch_without_a_copy() -> None:
    buckets, of_query, _ = buckets_of([(700, 900)] * 4)
    assert len(buckets.sides) == 1
    assert (buckets.q_order, buckets.k_order) == (None, None)
    (q_side, _) = buckets.sides[0]
    assert q_side.slots is None
    assert q_side.pad(of_query).data_ptr() == of_query.data_ptr()


def test_long_samples_are_computed_alone_where_they_lie() -> None:
    buckets, _, _ = buckets_of([(900, 1000), (400, 500), (1000, 900)])
    assert [q.length for q, _ in buckets.sides] == [900, 400, 1000]
    assert (buckets.q_order, buckets.k_order) == (None, None)


def test_short_samples_share_one_batch() -> None:
    buckets, _, _ = buckets_of([(3, 5), (4, 4), (2, 6), (5, 5)])
    assert len(buckets.sides) == 1


def test_gradients_return_to_their_rows() -> None:
    buckets, of_query, _ = buckets_of([(3, 5), (2, 0), (300, 290), (2, 6)])
    rows = torch.ones(of_query.numel(), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.arange(1.0, 2 * of_query.numel() + 1, dtype=torch.float64).view(-1, 2)
    sides = [q for q, _ in buckets.sides]
    pieces = [side.unpad(side.pad(x)) for side, x in zip(sides, buckets.split_q(rows), strict=True)]
    (buckets.join_q(pieces, 0.0) * weights).sum().backward()
    keyed = (of_query != 2)[:, None]
    assert rows.grad is not None
    assert torch.equal(rows.grad, weights * keyed)
