"""Histories equal those of a plain loop over the lines; the split holds out the last two events of a user."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.data.interactions import (
    events_to_test,
    events_to_train,
    events_to_validate,
    factorize,
    load_interactions,
)

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tclass:token_seq\tyear:float\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def inter(tmp_path: Path) -> Path:
    rows = ["10\t7\t5\t30", "9\t7\t1\t5", "10\t100\t4\t10", "10\t8\t5\t10", "10\t7\t5\t20"]
    return write(tmp_path / "x.inter", INTER + "".join(row + "\n" for row in rows))


@pytest.fixture
def item(tmp_path: Path) -> Path:
    return write(tmp_path / "x.item", ITEM + "100\tDrama War\t1990\n55\tWar\t2000\n7\tDrama\t1990\n8\tDrama War\t\n")


def test_orders_by_user_time_and_line(inter: Path) -> None:
    data = load_interactions(inter)
    assert data.user_ids.tolist() == ["9", "10"]  # numbers, not text
    assert data.item_ids.tolist() == ["7", "8", "100"]
    assert data.user_offsets.tolist() == [0, 1, 5]
    assert data.items.tolist() == [0, 2, 1, 0, 0]  # 100 before 8: the same time, an earlier line
    assert data.tokens.tolist() == data.items.tolist()
    assert data.times.tolist() == [5, 10, 10, 20, 30]
    assert data.action_values.tolist() == [1, 4, 5]
    assert data.actions.tolist() == [0, 1, 2, 2, 2]
    assert data.labels.tolist() == [1] * 5
    assert (data.n_users, data.n_items, data.n_tokens, data.n_actions, data.n_events) == (2, 3, 3, 3, 5)
    assert data.event_users().tolist() == [0, 1, 1, 1, 1]
    for name in ("items", "tokens", "actions", "user_offsets"):
        assert getattr(data, name).dtype == np.int64


def test_composite_tokens_join_the_item_file(inter: Path, item: Path) -> None:
    data = load_interactions(inter, item, tokens=("class", "rating"))
    # (Drama, 1), (Drama War, 4), (Drama War, 5), (Drama, 5), (Drama, 5) sort to 0, 2, 3, 1, 1
    assert data.tokens.tolist() == [0, 2, 3, 1, 1]
    assert data.n_tokens == 4 and data.unmatched_items == 0
    years = load_interactions(inter, item, tokens=("year",))
    assert years.tokens.tolist() == [0, 0, 1, 0, 0]  # the empty year is a value of its own
    mixed = load_interactions(inter, item, tokens=("rating", "class"))
    assert mixed.tokens.tolist() == [0, 1, 3, 2, 2]


def test_items_missing_from_the_item_file_have_empty_features(inter: Path, tmp_path: Path) -> None:
    item = write(tmp_path / "y.item", ITEM + "7\tDrama\t1990\n")
    data = load_interactions(inter, item, tokens=("class",))
    assert data.unmatched_items == 2 and data.tokens.tolist() == [1, 0, 0, 1, 1]
    assert load_interactions(inter, item, tokens=("year",)).tokens.tolist() == [0, 1, 1, 0, 0]


def test_action_none_and_labels(inter: Path) -> None:
    data = load_interactions(inter, action=None, label=("rating", 4.0))
    assert data.n_actions == 1 and data.actions.tolist() == [0] * 5
    assert data.labels.tolist() == [0, 1, 1, 1, 1] and data.labels.dtype == np.float32


def test_own_column_names(tmp_path: Path) -> None:
    path = write(tmp_path / "play.inter", "song:token\twho:token\twhen:token\nb\tx\t2\na\tx\t1\n")
    data = load_interactions(path, user="who", item="song", time="when", tokens=("song",), action=None)
    assert data.items.tolist() == [0, 1] and data.times.tolist() == [1, 2]


EVENT = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5), st.integers(0, 4))


@given(rows=st.lists(EVENT, min_size=1, max_size=40), length=st.integers(1, 8))
def test_equals_a_loop_over_lines(tmp_path_factory: pytest.TempPathFactory, rows: list, length: int) -> None:
    path = tmp_path_factory.mktemp("interactions") / "x.inter"
    write(path, INTER + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    data = load_interactions(path, tokens=("item_id", "rating"))
    histories: dict[int, list] = {}
    for row in rows:
        histories.setdefault(row[0], []).append(row)
    users = sorted(histories)
    for history in histories.values():
        history.sort(key=lambda row: row[3])
    ordered = [row for user in users for row in histories[user]]
    assert [int(x) for x in data.item_ids[data.items]] == [row[1] for row in ordered]
    assert data.action_values[data.actions].tolist() == [row[2] for row in ordered]
    assert data.times.tolist() == [row[3] for row in ordered]
    pairs = sorted({(row[1], row[2]) for row in rows})
    assert data.tokens.tolist() == [pairs.index((row[1], row[2])) for row in ordered]
    assert data.n_tokens == len(pairs)
    assert np.diff(data.user_offsets).tolist() == [len(histories[user]) for user in users]

    for last in (None, length):
        cut = [histories[user][-(last or 10**9) :] for user in users]
        distinct = [len({row[1:3] for row in history}) for history in cut]
        lengths = [len(history) for history in cut]
        measured = data.multiplicity(last)
        assert measured.mean == pytest.approx(np.mean([a / b for a, b in zip(lengths, distinct, strict=True)]))
        assert measured.total == pytest.approx(sum(lengths) / sum(distinct))

    train, valid, test = events_to_train(data), events_to_validate(data), events_to_test(data)
    expected: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for start, end in zip(data.user_offsets[:-1].tolist(), data.user_offsets[1:].tolist(), strict=True):
        held_out = 2 if end - start >= 3 else 0
        expected["train"] += range(start, end - held_out)
        expected["valid"] += range(end - 2, end - 2 + held_out // 2)
        expected["test"] += range(end - 1, end - 1 + held_out // 2)
    assert [train.tolist(), valid.tolist(), test.tolist()] == list(expected.values())


@pytest.mark.parametrize(
    ("values", "distinct"),
    [
        (["10", "9", "10"], ["9", "10"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9.5", "1"], ["1", "9.5", "10"]),
        (["1", "01", "2"], None),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["10", "9", ""], ["", "10", "9"]),
        (["10", "9", "nan"], ["10", "9", "nan"]),
        (["9" * 30, "1"], ["1", "9" * 30]),
        ([9.0, 10.0, 9.0], [9.0, 10.0]),
    ],
)
def test_factorize_sorts_numbers_as_numbers(values: list, distinct: list | None) -> None:
    codes, found = factorize(np.array(values))
    assert found[codes].tolist() == values and codes.dtype == np.int64
    assert len(found) == len(set(values))
    if distinct is not None:
        assert found.tolist() == distinct


@given(values=st.lists(st.text("0123456789-.x", max_size=4), min_size=1, max_size=20), as_object=st.booleans())
def test_factorize_keeps_every_value(values: list[str], as_object: bool) -> None:
    codes, distinct = factorize(np.array(values, dtype=object if as_object else str))
    assert distinct[codes].tolist() == values and len(distinct) == len(set(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": "uid"}, "user='uid' is not a column .* user_id, item_id, rating, timestamp"),
        ({"item": "iid"}, "item='iid' is not a column"),
        ({"time": "when"}, "time='when' is not a column"),
        ({"action": "click"}, "action='click' .* action=None"),
        ({"label": ("click", 1.0)}, "label='click'"),
        ({"tokens": ("genre",)}, "'genre' is not a column .*item has item_id, class, year"),
        ({"tokens": ()}, "tokens="),
        ({"tokens": "class"}, "tokens='class'"),
    ],
)
def test_unknown_columns(inter: Path, item: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_interactions(inter, item, **arguments)


def test_bad_files(inter: Path, item: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file"):
        load_interactions(tmp_path / "none.inter")
    with pytest.raises(ValueError, match="pass item_path if it is a column of an"):
        load_interactions(inter, tokens=("class",))
    twice = write(tmp_path / "twice.item", ITEM + "7\ta\t1\n8\ta\t1\n7\tb\t1\n")
    with pytest.raises(ValueError, match="item_id=7 more than once"):
        load_interactions(inter, twice, tokens=("class",))
    other = write(tmp_path / "other.item", ITEM + "x\ta\t1\n")
    with pytest.raises(ValueError, match="none of the items"):
        load_interactions(inter, other, tokens=("class",))
    with pytest.raises(ValueError, match="no interactions"):
        load_interactions(write(tmp_path / "empty.inter", INTER))
    with pytest.raises(ValueError, match=r"row 1 .* empty 'user_id'"):
        load_interactions(write(tmp_path / "a.inter", INTER + "1\t2\t3\t4\n\t2\t3\t4\n"))
    with pytest.raises(ValueError, match=r"time='timestamp' .* row 0"):
        load_interactions(write(tmp_path / "b.inter", INTER + "1\t2\t3\t\n"))
    with pytest.raises(ValueError, match=r"time='item_id' .* not numeric"):
        load_interactions(write(tmp_path / "c.inter", INTER + "1\tx\t3\t4\n"), time="item_id")
    with pytest.raises(ValueError, match="sequence_length=0"):
        load_interactions(inter).multiplicity(0)
