"""Atomic files are read as written, and malformed ones name the line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.data import atomic
from ta_plugin.data.atomic import atomic_columns, read_atomic

HEADER = "user_id:token\ttitle:token_seq\trating:float\tvector:float_seq\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_reads_every_type(tmp_path: Path) -> None:
    path = write(tmp_path / "x.inter", HEADER + 'u1\tLa "Vie" é\t3.5\t1 -2.5\nü\t\t\t\n')
    file = read_atomic(path)
    assert file.n_rows == 2
    assert file.types == {"user_id": "token", "title": "token_seq", "rating": "float", "vector": "float_seq"}
    assert file["user_id"].tolist() == ["u1", "ü"]
    assert file["title"].tolist() == ['La "Vie" é', ""]
    np.testing.assert_array_equal(file["rating"], [3.5, np.nan])
    assert file["rating"].dtype == np.float64
    offsets, words = file.split("title")
    assert offsets.tolist() == [0, 3, 3] and words.tolist() == ["La", '"Vie"', "é"]
    offsets, numbers = file.split("vector")
    assert offsets.tolist() == [0, 2, 2] and numbers.tolist() == [1.0, -2.5] and numbers.dtype == np.float64
    assert atomic_columns(path) == file.types


def test_chooses_columns_by_name_in_the_order_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.inter", HEADER + "a\tb c\t1\t2 3\n")
    file = read_atomic(path, ["rating", "user_id", "rating"])
    assert list(file.columns) == ["rating", "user_id"]
    with pytest.raises(ValueError, match=r"'title' was not read.*rating, user_id"):
        file["title"]
    with pytest.raises(ValueError, match="has type token"):
        file.split("user_id")


FIELD = st.text(st.characters(exclude_characters="\0\t\n\r", exclude_categories=["Cs"]), max_size=90)


@given(
    rows=st.lists(st.tuples(FIELD, st.floats(allow_nan=False), FIELD), max_size=12),
    block_bytes=st.integers(1, 200),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    bom=st.booleans(),
)
def test_equals_a_plain_split_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: list, block_bytes: int, end: str, last: bool, bom: bool
) -> None:
    lines = ["a:token\tb:float\tc:token", *(f"{a}\t{b!r}\t{c}" for a, b, c in rows)]
    text = end.join(lines) + (end if last else "")
    path = write(tmp_path_factory.mktemp("atomic") / "x.inter", (b"\xef\xbb\xbf" if bom else b"") + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_BLOCK_BYTES", block_bytes)
        file = read_atomic(path)
    assert file.n_rows == len(rows)
    assert file["a"].tolist() == [a for a, _, _ in rows]
    assert file["b"].tolist() == [b for _, b, _ in rows]
    assert file["c"].tolist() == [c for _, _, c in rows]


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.inter", "a:token\tb:float\n\n1\t2\n\r\n3\t4\n\n\n")
    assert read_atomic(path)["a"].tolist() == ["1", "3"]
    with pytest.raises(ValueError, match=r"line 4.*'b'.*'no'"):
        read_atomic(write(path, "a:token\tb:float\n\n1\t2\n3\tno\n"))


def test_an_empty_line_of_a_single_column_is_a_value(tmp_path: Path) -> None:
    path = write(tmp_path / "x.item", "a:token\nx\n\ny\n")
    assert read_atomic(path)["a"].tolist() == ["x", "", "y"]


def test_a_file_without_rows_keeps_its_dtypes(tmp_path: Path) -> None:
    file = read_atomic(write(tmp_path / "x.inter", HEADER))
    assert file.n_rows == 0 and file["rating"].dtype == np.float64 and file["user_id"].dtype.kind == "U"


@pytest.mark.parametrize("block_bytes", [4 << 20, 3])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a\tb\t1\t2\na\tb\t1\n", "line 3 .* has 3 tab-separated fields, but the header has 4"),
        ("a\tb\t1\t2\t9\n", "line 2 .* has 5 tab-separated"),
        ("a\tb\t1\t2\na\tb\tmany\t2\n", "line 3: column 'rating' .* is a float, but reads 'many'"),
        ("a\tb\t" + "1" * 70 + "x\t2\n", "line 2: column 'rating'"),
        (b"a\tb\t1\t2\n\xff\tb\t1\t2\n", "line 3: column 'user_id' .* not UTF-8"),
        (b"a\tb\t1\t2\na\t" + b"\xff" * 80 + b"\t1\t2\n", "line 3: column 'title' .* not UTF-8"),
        ("a\tb\t1\t2\n\0\tb\t1\t2\n", "line 3 .* NUL"),
    ],
)
def test_malformed_lines_name_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | bytes, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(atomic, "_BLOCK_BYTES", block_bytes)
    body = body.encode() if isinstance(body, str) else body
    path = write(tmp_path / "x.inter", HEADER.encode() + body)
    with pytest.raises(ValueError, match=message):
        read_atomic(path)


@pytest.mark.parametrize("header", ["", "user_id\titem:token", "a:int", ":token", "a:token\ta:float", b"\xff:token"])
def test_malformed_headers(tmp_path: Path, header: str | bytes) -> None:
    with pytest.raises(ValueError, match="line 1"):
        read_atomic(write(tmp_path / "x.inter", header))


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "x.inter", HEADER)
    with pytest.raises(ValueError, match=r"'rate' is not a column .* user_id, title, rating, vector"):
        read_atomic(path, ["rate"])
    with pytest.raises(ValueError, match="columns='rating' is one string"):
        read_atomic(path, "rating")
    with pytest.raises(ValueError, match="is not a file"):
        read_atomic(tmp_path / "none.inter")
    bad = write(path, HEADER + "a\tb\t1\t1 x\n")
    with pytest.raises(ValueError, match="'vector'"):
        read_atomic(bad).split("vector")
