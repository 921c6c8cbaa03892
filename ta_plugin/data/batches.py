"""Batches of histories: a map from (epoch, step) to the arrays one rank trains or evaluates on.

Every batch is a pure function of the data, the seed, the epoch, the step and the rank, so a run resumes at any step
without replaying the ones before, and nothing of a loader has to be saved.
"""

from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ta_plugin.data.interactions import Interactions, events_to_test, events_to_train, events_to_validate

Part = Literal["valid", "test"]
_ORDER, _NEGATIVES = 0, 1  # streams of random numbers, apart from each other under one seed


@dataclass(frozen=True)
class Histories:
    """Padded histories, oldest event first, for B samples of at most L events; 0 beyond each length.

    Attributes:
        tokens: int64 `(B, L)`.
        lengths: int64 `(B,)`, in [0, L].
        items: int64 `(B, L)`, item codes.
        actions: int64 `(B, L)`, action codes.
        ages: float32 `(B, L)`, seconds from the history's event to the event to predict, >= 0.
        weights: float32 `(B,)`, 1 for samples and 0 for those that pad the batch; these have length 0.
    """

    tokens: Tensor
    lengths: Tensor
    items: Tensor
    actions: Tensor
    ages: Tensor
    weights: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return type(self)(**moved)


@dataclass(frozen=True)
class Batch(Histories):
    """A training batch: histories and T targets for each.

    Attributes:
        targets: int64 `(B, T)`, item codes: the item of the event to predict, then T - 1 sampled negatives.
        labels: float32 `(B, T)`: the event's own label (1 unless the data says otherwise), then 0 for the negatives.
    """

    targets: Tensor
    labels: Tensor


@dataclass(frozen=True)
class EvaluationBatch(Histories):
    """An evaluation batch: histories, one positive for each, and what not to rank.

    Attributes:
        positive: int64 `(B,)`, item code of the held-out event; 0 in samples that pad the batch.
        seen: int64 `(B, S)`, item codes of all events before the held-out one, those before the history included,
            padded with -1; S is the longest of the batch and at least 1.
    """

    positive: Tensor
    seen: Tensor

    def seen_mask(self, n_items: int) -> Tensor:
        """`seen` as bool `(B, n_items)`, True where the user met the item before the held-out event."""
        mask = torch.zeros(len(self.seen), n_items + 1, dtype=torch.bool, device=self.seen.device)
        # padding goes to an extra column, which is cut off
        return mask.scatter_(1, torch.where(self.seen < 0, n_items, self.seen), True)[:, :n_items]


class HistoryBatches:
    """Training and evaluation batches of one rank, of exactly `batch_size` samples each.

    A training sample is an event that trains (see `events_to_train`); its history is the user's last
    `sequence_length` events strictly before it, in the order of the data, so an event at the same second but earlier
    in the file counts as before. A user's first event therefore has a history of length 0, unless `min_history` leaves
    such samples out. Every epoch visits each sample once, in an order drawn from (seed, epoch); ranks take turns along
    that order, so all have the same number of batches and the last one is short by at most one more sample on some
    ranks than on others. What is missing there is padded with samples of length 0 and weight 0; nothing is dropped.

    Negatives are uniform, with replacement, over the items that the user met in none of the events that train (the
    event to predict is one of them). Items met only in the held-out events can be drawn: leaving them out would tell
    the model about them.

    Args:
        interactions: the data; every rank passes the same.
        batch_size: samples per rank and step, B.
        sequence_length: longest history, L.
        n_negatives: sampled negatives per sample; T = 1 + n_negatives.
        rank, world_size: this process among those that share the samples.
        seed: of the order and the negatives, >= 0.
        min_history: samples with fewer events before them are left out of training.

    Raises:
        ValueError: an argument is out of range, no event is left to train on, or negatives are asked for a user who
            met every item.
    """

    def __init__(
        self,
        interactions: Interactions,
        *,
        batch_size: int,
        sequence_length: int,
        n_negatives: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        min_history: int = 0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("sequence_length", sequence_length, 1),
            ("n_negatives", n_negatives, 0),
            ("world_size", world_size, 1),
            ("seed", seed, 0),
            ("min_history", min_history, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in [0, world_size={world_size})")
        self.interactions = interactions
        self.batch_size, self.sequence_length, self.n_negatives = batch_size, sequence_length, n_negatives
        self.rank, self.world_size, self.seed = rank, world_size, seed

        self._event_users = interactions.event_users()
        train = events_to_train(interactions)
        before = train - interactions.user_offsets[self._event_users[train]]
        self._samples = train[before >= min_history]
        if len(self._samples) == 0:
            raise ValueError(
                f"interactions: none of the {interactions.n_events} events has min_history={min_history} or more "
                "before it and trains; lower min_history or pass more data"
            )
        self._held_out = {"valid": events_to_validate(interactions), "test": events_to_test(interactions)}
        self._met_offsets, self._met_gaps = self._items_met(train)
        self._order: tuple[int, np.ndarray] | None = None  # that of one epoch, kept because drawing it takes a while

    @property
    def steps_per_epoch(self) -> int:
        """Training batches in an epoch, the same on every rank."""
        return -(-len(self._samples) // (self.batch_size * self.world_size))

    @property
    def n_samples(self) -> int:
        """Training samples in an epoch, over all ranks."""
        return len(self._samples)

    def batch(self, epoch: int, step: int) -> Batch:
        """The training batch of this rank at `step` of `epoch`, both from 0; tensors on the CPU."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0")
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step={step} must lie in [0, steps_per_epoch={self.steps_per_epoch})")
        events, real = self._share(self._epoch_order(epoch), step)
        histories = self._histories(events, real)
        targets = np.zeros((self.batch_size, 1 + self.n_negatives), dtype=np.int64)
        targets[real, 0] = self.interactions.items[events[real]]
        targets[real, 1:] = self._negatives(events[real], self._random(_NEGATIVES, epoch, step, self.rank))
        labels = np.zeros(targets.shape, dtype=np.float32)
        labels[real, 0] = self.interactions.labels[events[real]]
        return Batch(**histories, targets=torch.from_numpy(targets), labels=torch.from_numpy(labels))

    def evaluation_steps(self, part: Part) -> int:
        """Evaluation batches of `part`, the same on every rank; 0 where no user has an event held out."""
        return -(-len(self._part(part)) // (self.batch_size * self.world_size))

    def evaluation_batch(self, part: Part, step: int) -> EvaluationBatch:
        """The evaluation batch of this rank at `step`, from 0: one sample per user, in the order of users.

        The history of a `test` sample ends with the user's validation event.
        """
        held_out = self._part(part)
        steps = self.evaluation_steps(part)
        if not 0 <= step < steps:
            raise ValueError(f"step={step} must lie in [0, evaluation_steps({part!r})={steps})")
        events, real = self._share(held_out, step)
        histories = self._histories(events, real)
        starts = self.interactions.user_offsets[self._event_users[events]]
        n_seen = np.where(real, events - starts, 0)
        index, inside = _ranges(starts, n_seen, max(1, int(n_seen.max())), len(self.interactions.items))
        seen = np.where(inside, self.interactions.items[index], -1)
        positive = np.where(real, self.interactions.items[events], 0)
        return EvaluationBatch(**histories, positive=torch.from_numpy(positive), seen=torch.from_numpy(seen))

    def _part(self, part: Part) -> np.ndarray:
        if part not in self._held_out:
            raise ValueError(f"part={part!r} must be 'valid' or 'test'")
        return self._held_out[part]

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *stream])))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._random(_ORDER, epoch).permutation(self._samples))
        return self._order[1]

    def _share(self, events: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's events at `step` and which of them are real, both `(B,)`; the others pad."""
        span = self.batch_size * self.world_size
        mine = events[step * span : (step + 1) * span][self.rank :: self.world_size]
        padded = np.zeros(self.batch_size, dtype=np.int64)
        padded[: len(mine)] = mine
        return padded, np.arange(self.batch_size) < len(mine)

    def _histories(self, events: np.ndarray, real: np.ndarray) -> dict[str, Tensor]:
        data = self.interactions
        before = events - data.user_offsets[self._event_users[events]]
        lengths = np.where(real, np.minimum(before, self.sequence_length), 0)
        index, inside = _ranges(events - lengths, lengths, self.sequence_length, data.n_events)
        ages = np.where(inside, data.times[events][:, None] - data.times[index], 0).astype(np.float32)
        arrays = {
            "tokens": np.where(inside, data.tokens[index], 0),
            "lengths": lengths,
            "items": np.where(inside, data.items[index], 0),
            "actions": np.where(inside, data.actions[index], 0),
            "ages": ages,
            "weights": real.astype(np.float32),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _items_met(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each user, the m distinct items of the events that train, as what `_negatives` searches.

        Returns:
            `(offsets, gaps)`: offsets int64 `(n_users + 1,)`. With the user's items s_0 < s_1 < ..., the number of
            items not met below s_j is s_j - j; gaps holds `user * (n_items + 1) + s_j - j`, which ascends over all.
        """
        data = self.interactions
        pairs = np.unique(self._event_users[train] * data.n_items + data.items[train])
        users, items = pairs // data.n_items, pairs % data.n_items
        counts = np.bincount(users, minlength=data.n_users)
        if self.n_negatives > 0 and (counts == data.n_items).any():
            user = data.user_ids[np.argmax(counts == data.n_items)]
            raise ValueError(
                f"n_negatives={self.n_negatives}, but user {user!s} met all {data.n_items} items in training, so there "
                "is none to draw; pass n_negatives=0 or leave that user out"
            )
        offsets = np.zeros(data.n_users + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        return offsets, users * (data.n_items + 1) + items - (np.arange(len(pairs)) - offsets[users])

    def _negatives(self, events: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Items not met, int64 `(len(events), n_negatives)`: the r-th of them, for a uniform r, with no rejection."""
        n_items = self.interactions.n_items
        users = self._event_users[events][:, None]
        first = self._met_offsets[users]
        n_unmet = n_items - (self._met_offsets[users + 1] - first)
        shape = (len(events), self.n_negatives)
        if self.n_negatives == 0:
            return np.zeros(shape, dtype=np.int64)
        r = random.integers(0, np.broadcast_to(n_unmet, shape))
        # the met items below the r-th unmet one are those with s_j - j <= r
        return r + np.searchsorted(self._met_gaps, users * (n_items + 1) + r, side="right") - first


def _ranges(starts: np.ndarray, lengths: np.ndarray, width: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices `starts[i] + j` below n, and whether j < lengths[i], both `(B, width)`."""
    columns = np.arange(width)
    return np.minimum(starts[:, None] + columns, n - 1), columns < lengths[:, None]
