"""Batches hold the histories a plain loop finds, on every rank and after a resume, and negatives nobody met."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.data.batches import Batch, EvaluationBatch, HistoryBatches, Part
from ta_plugin.data.interactions import Interactions, events_to_test, events_to_train, events_to_validate


def make(lengths: list[int], n_items: int, seed: int = 0) -> Interactions:
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = int(offsets[-1])
    times = [np.sort(random.integers(0, 50, length)) for length in lengths]
    return Interactions(
        user_offsets=offsets,
        items=random.integers(0, n_items, n),
        tokens=random.integers(1, 9, n),
        times=np.concatenate([*times, []]).astype(np.float64),
        actions=random.integers(1, 4, n),
        labels=random.integers(0, 2, n).astype(np.float32),
        n_users=len(lengths),
        n_items=n_items,
        n_tokens=9,
        n_actions=4,
        user_ids=np.arange(len(lengths)).astype(str),
        item_ids=np.arange(n_items).astype(str),
        action_values=np.arange(4.0),
    )


def all_equal(a: Batch | EvaluationBatch, b: Batch | EvaluationBatch) -> bool:
    return all(torch.equal(x, getattr(b, name)) for name, x in vars(a).items())


def check_history(data: Interactions, batch: Batch | EvaluationBatch, row: int, event: int, length: int) -> None:
    """`batch[row]` holds the `length` latest events before `event`, and nothing after them."""
    user = int(data.event_users()[event])
    start = max(int(data.user_offsets[user]), event - length)
    n = event - start
    assert batch.lengths[row] == n and batch.weights[row] == 1
    for padded, values in (
        (batch.tokens, data.tokens),
        (batch.items, data.items),
        (batch.actions, data.actions),
        (batch.ages, data.times[event] - data.times),
    ):
        assert padded[row, :n].tolist() == values[start:event].tolist()
        assert not padded[row, n:].any()
    assert (batch.ages[row] >= 0).all()


def check_padding(batch: Batch | EvaluationBatch, row: int) -> None:
    assert batch.weights[row] == 0 and batch.lengths[row] == 0
    for padded in (batch.tokens, batch.items, batch.actions, batch.ages):
        assert not padded[row].any()


CASE = {
    "lengths": st.lists(st.integers(1, 9), min_size=1, max_size=7),
    "batch_size": st.integers(1, 5),
    "sequence_length": st.integers(1, 10),
    "world_size": st.integers(1, 4),
    "seed": st.integers(0, 100),
}


@given(**CASE, n_negatives=st.integers(0, 3), min_history=st.integers(0, 1))
def test_an_epoch_visits_every_sample_once(
    lengths: list[int],
    batch_size: int,
    sequence_length: int,
    world_size: int,
    seed: int,
    n_negatives: int,
    min_history: int,
) -> None:
    data = make([*lengths, 4], n_items=12, seed=seed)
    offsets, users = data.user_offsets, data.event_users()
    samples = [int(p) for p in events_to_train(data) if p - offsets[users[p]] >= min_history]
    expected = sorted(
        (
            data.tokens[max(offsets[users[p]], p - sequence_length) : p].tolist(),
            int(data.items[p]),
            float(data.labels[p]),
        )
        for p in samples
    )
    ranks = [
        HistoryBatches(
            data,
            batch_size=batch_size,
            sequence_length=sequence_length,
            n_negatives=n_negatives,
            rank=rank,
            world_size=world_size,
            seed=seed,
            min_history=min_history,
        )
        for rank in range(world_size)
    ]
    steps = ranks[0].steps_per_epoch
    assert all(rank.steps_per_epoch == steps and rank.n_samples == len(samples) for rank in ranks)
    assert steps == int(np.ceil(len(samples) / (batch_size * world_size)))
    found = []
    for step in range(steps):
        batches = [rank.batch(3, step) for rank in ranks]
        real = [int(batch.weights.sum()) for batch in batches]
        assert max(real) - min(real) <= 1  # the last batch is evened out
        for batch, n in zip(batches, real, strict=True):
            assert batch.tokens.shape == (batch_size, sequence_length)
            assert batch.targets.shape == batch.labels.shape == (batch_size, 1 + n_negatives)
            assert not batch.labels[:, 1:].any()
            for row in range(n, batch_size):
                check_padding(batch, row)
                assert not batch.targets[row].any() and not batch.labels[row].any()
            for row in range(n):
                history = batch.tokens[row, : batch.lengths[row]].tolist()
                found.append((history, int(batch.targets[row, 0]), float(batch.labels[row, 0])))
    assert sorted(found) == expected


def unique_items(lengths: list[int], n_items: int) -> Interactions:
    """Users who share no item, so that the positive tells the event."""
    data = make(lengths, n_items)
    data.items[:] = np.arange(data.n_events)
    return data


@given(**CASE)
def test_training_histories_are_what_came_before(
    lengths: list[int], batch_size: int, sequence_length: int, world_size: int, seed: int
) -> None:
    data = unique_items(lengths, n_items=100)
    for rank in range(world_size):
        batches = HistoryBatches(
            data,
            batch_size=batch_size,
            sequence_length=sequence_length,
            n_negatives=2,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(0, step)
            for row in range(int(batch.weights.sum())):
                check_history(data, batch, row, int(batch.targets[row, 0]), sequence_length)


@given(**CASE)
def test_evaluation_has_every_held_out_event_once(
    lengths: list[int], batch_size: int, sequence_length: int, world_size: int, seed: int
) -> None:
    data = make(lengths, n_items=6, seed=seed)
    ranks = [
        HistoryBatches(
            data, batch_size=batch_size, sequence_length=sequence_length, n_negatives=0, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    parts: list[tuple[Part, np.ndarray]] = [("valid", events_to_validate(data)), ("test", events_to_test(data))]
    for part, held_out in parts:
        steps = ranks[0].evaluation_steps(part)
        assert steps == int(np.ceil(len(held_out) / (batch_size * world_size)))
        visited = 0
        for step in range(steps):
            batches = [rank.evaluation_batch(part, step) for rank in ranks]
            real = [int(batch.weights.sum()) for batch in batches]
            assert max(real) - min(real) <= 1
            for rank, (batch, n) in enumerate(zip(batches, real, strict=True)):
                mask = batch.seen_mask(data.n_items)
                assert mask.shape == (batch_size, data.n_items) and batch.tokens.shape == (batch_size, sequence_length)
                for row in range(n):
                    event = int(held_out[(step * batch_size + row) * world_size + rank])
                    check_history(data, batch, row, event, sequence_length)
                    assert batch.positive[row] == data.items[event]
                    start = data.user_offsets[data.event_users()[event]]
                    before = data.items[start:event].tolist()  # all of them, not the last sequence_length
                    assert batch.seen[row][batch.seen[row] >= 0].tolist() == before
                    assert mask[row].nonzero().flatten().tolist() == sorted(set(before))
                    visited += 1
                for row in range(n, batch_size):
                    check_padding(batch, row)
                    assert batch.positive[row] == 0 and not mask[row].any()
        assert visited == len(held_out)


def test_a_batch_depends_on_seed_epoch_step_and_rank_alone() -> None:
    data = make([75], n_items=200)  # with one user, equal random numbers would give equal negatives

    def loader(rank: int = 0, seed: int = 5) -> HistoryBatches:
        return HistoryBatches(data, batch_size=4, sequence_length=8, n_negatives=3, rank=rank, world_size=2, seed=seed)

    run = loader()
    straight = {(epoch, step): run.batch(epoch, step) for epoch in range(2) for step in range(run.steps_per_epoch)}
    resumed = loader()
    for key in reversed(straight):  # any order, and a fresh loader
        assert all_equal(resumed.batch(*key), straight[key])
    first = straight[0, 0]
    for other in (straight[1, 0], straight[0, 1], loader(rank=1).batch(0, 0), loader(seed=6).batch(0, 0)):
        assert not torch.equal(first.tokens, other.tokens)
        assert not torch.equal(first.targets[:, 1:], other.targets[:, 1:])


def test_negatives_are_uniform_over_items_not_met_in_training() -> None:
    data = make([6, 5, 2], n_items=9)
    data.items[:] = [8, 0, 3, 0, 5, 6, 1, 2, 2, 0, 7, 4, 8]
    # user 0 trains on 8 0 3 0 (5 and 6 are held out), user 1 on 1 2 2, user 2 on 4 8
    allowed = {0: [1, 2, 4, 5, 6, 7], 1: [0, 3, 4, 5, 6, 7, 8], 2: [0, 1, 2, 3, 5, 6, 7]}
    batches = HistoryBatches(data, batch_size=9, sequence_length=4, n_negatives=6000)
    # with 9 samples in one batch, those of a user are told by the positive and the history
    of_positive = {(8, 0): 0, (0, 1): 0, (3, 2): 0, (0, 3): 0, (1, 0): 1, (2, 1): 1, (2, 2): 1, (4, 0): 2, (8, 1): 2}
    batch = batches.batch(0, 0)
    for row in range(9):
        user = of_positive[int(batch.targets[row, 0]), int(batch.lengths[row])]
        counts = torch.bincount(batch.targets[row, 1:], minlength=9).numpy()
        assert counts.nonzero()[0].tolist() == allowed[user]
        mean = 6000 / len(allowed[user])
        assert abs(counts[allowed[user]] - mean).max() < 6 * mean**0.5


def test_a_user_without_unmet_items_is_refused_only_with_negatives() -> None:
    data = make([5, 4], n_items=3)
    data.items[:] = [0, 1, 2, 0, 0, 1, 1, 1, 1]
    HistoryBatches(data, batch_size=2, sequence_length=2, n_negatives=0).batch(0, 0)
    with pytest.raises(ValueError, match="n_negatives=1, but user 0 met all 3 items"):
        HistoryBatches(data, batch_size=2, sequence_length=2, n_negatives=1)


def test_to_moves_every_tensor() -> None:
    batches = HistoryBatches(make([5], n_items=9), batch_size=2, sequence_length=3, n_negatives=1)
    for batch in (batches.batch(0, 0), batches.evaluation_batch("test", 0)):
        moved = batch.to("meta")
        assert type(moved) is type(batch) and all(tensor.is_meta for tensor in vars(moved).values())


def test_no_held_out_events_means_no_evaluation_steps() -> None:
    batches = HistoryBatches(make([2, 1], n_items=9), batch_size=2, sequence_length=3, n_negatives=1)
    assert batches.evaluation_steps("valid") == batches.evaluation_steps("test") == 0
    assert batches.n_samples == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"n_negatives": -1}, "n_negatives=-1"),
        ({"world_size": 0}, "world_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2 must lie in"),
        ({"seed": -1}, "seed=-1"),
        ({"min_history": 50}, "min_history=50"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistoryBatches(make([5], n_items=9), **{"batch_size": 2, "sequence_length": 3, "n_negatives": 1, **arguments})


def test_bad_steps() -> None:
    batches = HistoryBatches(make([5], n_items=9), batch_size=2, sequence_length=3, n_negatives=1)
    for call in (
        lambda: batches.batch(-1, 0),
        lambda: batches.batch(0, 2),
        lambda: batches.batch(0, -1),
        lambda: batches.evaluation_batch("valid", 1),
        lambda: batches.evaluation_batch("train", 0),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"epoch=-1|step=|part='train'"):
            call()
