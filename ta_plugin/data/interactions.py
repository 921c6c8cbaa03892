"""Users' histories in time order, and the leave-one-out split over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from ta_plugin.data.atomic import AtomicFile, atomic_columns, read_atomic

FilePath = str | PathLike[str]


@dataclass(frozen=True)
class Multiplicity:
    """How often a distinct token occurs in a history: L / U, with L occurrences of U distinct tokens.

    Attributes:
        mean: mean over users of each user's own L / U.
        total: sum of L over users, divided by the sum of U over users.
    """

    mean: float
    total: float


@dataclass(frozen=True)
class Interactions:
    """Every user's events, one user after another, each in order of (time, line of the file).

    Attributes:
        user_offsets: int64 `(n_users + 1,)`; user u has the events `user_offsets[u]` to `user_offsets[u + 1]`.
        items: int64 `(n_events,)`, codes in [0, n_items).
        tokens: int64 `(n_events,)`, codes in [0, n_tokens): what attention takes as equal or different.
        times: float64 `(n_events,)`, seconds (the unit of the file is taken as it is), finite.
        actions: int64 `(n_events,)`, codes in [0, n_actions); all 0 where no action column was named.
        labels: float32 `(n_events,)`, 1 where the event is a positive, otherwise 0; all 1 where no label was asked.
        n_users, n_items, n_tokens, n_actions: how many of each occur in the events (an item of the item file that
            nobody interacted with has no code); n_actions is 1 where no action column was named.
        user_ids, item_ids, action_values: `(n_users,)`, `(n_items,)`, `(n_actions,)`: the file's value of each code.
        unmatched_items: items that the item file lacks; their features read as empty text, or NaN.
    """

    user_offsets: np.ndarray
    items: np.ndarray
    tokens: np.ndarray
    times: np.ndarray
    actions: np.ndarray
    labels: np.ndarray
    n_users: int
    n_items: int
    n_tokens: int
    n_actions: int
    user_ids: np.ndarray
    item_ids: np.ndarray
    action_values: np.ndarray
    unmatched_items: int = 0

    @property
    def n_events(self) -> int:
        """Number of events of all users."""
        return len(self.items)

    def event_users(self) -> np.ndarray:
        """The user of every event, int64 `(n_events,)`, in ascending order."""
        return np.repeat(np.arange(self.n_users, dtype=np.int64), np.diff(self.user_offsets))

    def multiplicity(self, sequence_length: int | None = None) -> Multiplicity:
        """L / U over the users' histories: whole, or only the last `sequence_length` events of each."""
        if sequence_length is not None and sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1, or None for whole histories")
        users = self.event_users()
        keep = np.ones(self.n_events, dtype=bool)
        if sequence_length is not None:
            keep = np.arange(self.n_events) >= self.user_offsets[1:][users] - sequence_length
        pairs = np.unique(users[keep] * self.n_tokens + self.tokens[keep])
        occurrences = np.bincount(users[keep], minlength=self.n_users)
        distinct = np.bincount(pairs // self.n_tokens, minlength=self.n_users)
        return Multiplicity(
            mean=float(np.mean(occurrences / distinct)), total=float(occurrences.sum() / distinct.sum())
        )


def load_interactions(
    inter_path: FilePath,
    item_path: FilePath | None = None,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
    tokens: Sequence[str] = ("item_id",),
    action: str | None = "rating",
    label: tuple[str, float] | None = None,
    names: Mapping[str, str] | None = None,
) -> Interactions:
    """Reads histories from a RecBole `.inter` file, joined with an `.item` file where tokens need one.

    Codes follow the order of the values, so they do not depend on the order of the lines: numerically where every value
    of a column is a number, else by code point. An empty field is a value of its own.

    Args:
        inter_path: file of interactions, one a line.
        item_path: file of item features, joined on the column `item` of both files.
        user, item, time: columns of the `.inter` file. Time is in seconds.
        tokens: one or more columns of the `.inter` or the `.item` file (the `.inter` file wins where both have one).
            Several are packed into one composite id by mixed radix, first column most significant, and compacted to
            the ids that occur. A sequence column counts as one value, the whole string.
        action: column of the `.inter` file that says what the user did (a rating, a kind of click), or None.
        label: None: every event is a positive. `(column, threshold)`: events whose value in that numeric column of the
            `.inter` file is at least the threshold are.
        names: what messages call an argument, where the caller knows it by another name: a command by its option.

    Raises:
        ValueError: a file or column is missing, a line is malformed, there are no interactions, a user or item id is
            empty, a time is not finite, the item file lists an item twice, or it shares no item with the interactions.
    """
    if isinstance(tokens, str) or not tokens:
        raise ValueError(f"tokens={tokens!r} must be a sequence of one or more column names, such as ('{item}',)")
    names = names or {}
    there = atomic_columns(inter_path)
    features = atomic_columns(item_path) if item_path is not None else {}
    named = {"user": user, "item": item, "time": time}
    if action is not None:
        named["action"] = action
    if label is not None:
        named["label"] = label[0]
    for argument, name in named.items():
        if name not in there:
            remedy = f", or pass {names.get('action=None', 'action=None')}" if argument == "action" else ""
            raise ValueError(
                f"{names.get(argument, argument)}={name!r} is not a column of {inter_path}, which has {', '.join(there)}; name one{remedy}"
            )
    for name in tokens:
        if name not in there and name not in features:
            remedy = f"pass {names.get('item_path', 'item_path')} if it is a column of an .item file"
            if item_path is not None:
                remedy = f"{item_path} has {', '.join(features)}"
            raise ValueError(
                f"{names.get('tokens', 'tokens')}: {name!r} is not a column of {inter_path}, which has {', '.join(there)}; {remedy}"
            )

    table = read_atomic(inter_path, [*named.values(), *(name for name in tokens if name in there)])
    if table.n_rows == 0:
        raise ValueError(f"{inter_path} holds no interactions; it needs at least one line after the header")
    user_codes, user_ids = _identifiers(table, user)
    item_codes, item_ids = _identifiers(table, item)
    times = _numbers(table, time, names.get("time", "time"))
    order = np.lexsort((times, user_codes))  # stable: ties keep the order of the file
    action_codes, action_values = (np.zeros(table.n_rows, dtype=np.int64), np.array([""]))
    if action is not None:
        action_codes, action_values = factorize(table[action])
    labels = np.ones(table.n_rows, dtype=np.float32)
    if label is not None:
        labels = (_numbers(table, label[0], names.get("label", "label")) >= label[1]).astype(np.float32)

    rows, unmatched = None, 0
    joined = [name for name in tokens if name not in there]
    if item_path is not None and joined:
        if item not in features:
            raise ValueError(
                f"{names.get('item', 'item')}={item!r} is not a column of {item_path}, which has {', '.join(features)}; rename it"
            )
        item_table = read_atomic(item_path, [item, *joined])
        rows = _match(item_ids, item_table, item)
        unmatched = int((rows < 0).sum())
    token_columns = []
    for name in tokens:
        if name in there:
            token_columns.append(factorize(table[name]))
        else:
            assert rows is not None
            codes, values = factorize(_take_or_empty(item_table[name], rows))
            token_columns.append((codes[item_codes], values))
    token_codes, n_tokens = _pack(token_columns)

    offsets = np.zeros(len(user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(user_codes, minlength=len(user_ids)), out=offsets[1:])
    return Interactions(
        user_offsets=offsets,
        items=item_codes[order],
        tokens=token_codes[order],
        times=times[order],
        actions=action_codes[order],
        labels=labels[order],
        n_users=len(user_ids),
        n_items=len(item_ids),
        n_tokens=n_tokens,
        n_actions=len(action_values),
        user_ids=user_ids,
        item_ids=item_ids,
        action_values=action_values,
        unmatched_items=unmatched,
    )


def events_to_train(interactions: Interactions) -> np.ndarray:
    """Indices of the events that train, int64, ascending: all but the last two of each user.

    Users with fewer than 3 events have none held out: all of theirs train.
    """
    train = np.ones(interactions.n_events, dtype=bool)
    train[events_to_validate(interactions)] = False
    train[events_to_test(interactions)] = False
    return np.flatnonzero(train)


def events_to_validate(interactions: Interactions) -> np.ndarray:
    """Indices of the events that validate, int64, ascending: the last but one of every user with at least 3."""
    return events_to_test(interactions) - 1


def events_to_test(interactions: Interactions) -> np.ndarray:
    """Indices of the events that test, int64, ascending: the last of every user with at least 3."""
    ends = interactions.user_offsets[1:]
    return ends[np.diff(interactions.user_offsets) >= 3] - 1


def factorize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a column by the order of its values.

    Args:
        values: `(n,)` float64, `str` or object of `str`.

    Returns:
        `(codes, distinct)`: codes int64 `(n,)`, with `distinct[codes]` equal to `values`; distinct values ascend,
        numerically where each is a finite number. Text is equal only as text: `1` differs from `1.0` and from `01`.
    """
    integers = _plain_integers(values)
    if integers is not None:  # integers sort many times faster than text
        distinct, codes = np.unique(integers, return_inverse=True)
        return codes.astype(np.int64, copy=False), distinct.astype(values.dtype)
    distinct, codes = np.unique(values, return_inverse=True)
    codes = codes.astype(np.int64, copy=False)
    if values.dtype.kind == "f":
        return codes, distinct
    try:
        numbers = distinct.astype(np.float64)
    except ValueError:
        return codes, distinct
    if not np.isfinite(numbers).all():
        return codes, distinct
    order = np.argsort(numbers, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[codes].astype(np.int64, copy=False), distinct[order]


def _plain_integers(values: np.ndarray) -> np.ndarray | None:
    """Text as int64, or None unless every value is a non-negative integer written without leading zeros."""
    width = values.dtype.itemsize // 4
    if values.dtype.kind != "U" or not 1 <= width <= 18:  # 18 digits fit an int64
        return None
    characters = np.ascontiguousarray(values).view(np.uint32).reshape(len(values), width)
    if (characters[:, 0] == 0).any() or (
        width > 1 and ((characters[:, 0] == ord("0")) & (characters[:, 1] != 0)).any()
    ):
        return None
    numbers = np.zeros(len(values), dtype=np.int64)
    for column in characters.T:
        present = column != 0
        digit = column - np.uint32(ord("0"))  # wraps to a large number below "0"
        if (digit[present] > 9).any():
            return None
        numbers = np.where(present, numbers * 10 + digit, numbers)
    return numbers


def _identifiers(table: AtomicFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    codes, distinct = factorize(table[name])
    empty = np.isnan(distinct) if distinct.dtype.kind == "f" else distinct == ""
    if empty.any():
        row = int(np.flatnonzero(empty[codes])[0])
        raise ValueError(f"row {row} (from 0) of {table.path} has an empty {name!r}; fill it in or remove the row")
    return codes, distinct


def _numbers(table: AtomicFile, name: str, argument: str) -> np.ndarray:
    values = table[name]
    try:
        numbers = values.astype(np.float64)
    except ValueError as error:
        raise ValueError(
            f"{argument}={name!r} of {table.path} is not numeric ({error}); name a numeric column"
        ) from None
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        raise ValueError(
            f"{argument}={name!r} of {table.path} is {values[wrong[0]]} in row {wrong[0]} (from 0); it must be finite"
        )
    return numbers


def _match(item_ids: np.ndarray, table: AtomicFile, name: str) -> np.ndarray:
    """Row of the item file for each item, int64 `(n_items,)`, -1 where it has none."""
    row_of = {value: row for row, value in enumerate(table[name].tolist())}
    if len(row_of) < table.n_rows:
        values, counts = np.unique(table[name], return_counts=True)
        raise ValueError(f"{table.path} lists {name}={values[counts > 1][0]!s} more than once; keep one line an item")
    rows = np.array([row_of.get(value, -1) for value in item_ids.tolist()], dtype=np.int64)
    if (rows < 0).all():
        raise ValueError(
            f"{table.path} has none of the items of the interactions in its column {name!r}; check the path"
        )
    return rows


def _take_or_empty(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    taken = column[np.maximum(rows, 0)]
    taken[rows < 0] = np.nan if column.dtype.kind == "f" else ""
    return taken


def _pack(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    """One code per event from the codes of several columns; compacts after each, so that the radix cannot overflow."""
    packed, size = np.zeros(len(columns[0][0]), dtype=np.int64), 1
    for codes, distinct in columns:
        occurring, packed = np.unique(packed * len(distinct) + codes, return_inverse=True)
        size = len(occurring)
    return packed.astype(np.int64, copy=False), size
