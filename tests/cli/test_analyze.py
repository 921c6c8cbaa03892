"""`analyze` counts what is in the data, in every format it reads, and says what it cannot read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ta_plugin.cli.main import app
from ta_plugin.data.repeats import Repeats, read_ids, windows


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)], terminal_width=200)
    assert result.exit_code == 0, result.output
    return result.output


def row_of(output: str, length: str) -> list[str]:
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")
    ]
    return next(row for row in rows if row[0] == length)


def test_counts_of_samples() -> None:
    samples = [torch.tensor([5, 5, 7, 5]), torch.tensor([9, 7]), torch.tensor([], dtype=torch.int64)]
    found = Repeats.of(samples, 4)
    assert (found.occurrences, found.rows, found.ids) == (6, 4, 3)
    assert (found.pairs, found.position_pairs) == (2 * 2 + 2 * 2, 16 + 4)
    assert Repeats.of(samples, 2).occurrences == 4  # the last two of each


def test_a_raw_stream_is_cut_into_windows(tmp_path: Path) -> None:
    stream = np.tile(np.arange(16, dtype=np.int32), 64)  # each window of 64 holds 16 distinct tokens 4 times
    stream.tofile(tmp_path / "ids.bin")
    output = run(tmp_path / "ids.bin", "--dtype", "int32", "--length", 64, "--samples", 8)
    assert row_of(output, "64") == ["64", "8", "4.00", "16", "16x", "4x", "32x"]


def test_rows_of_an_array_are_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1, 1, 1, 1], [2, 3, 4, 5]]))
    assert row_of(run(tmp_path / "ids.npy"), "4")[:4] == ["4", "2", "1.60", "2"]


def test_histories_of_an_inter_file(tmp_path: Path) -> None:
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [f"a\t{item}\t{when}" for when, item in enumerate("xyxyxx")] + ["b\ty\t0"]
    (tmp_path / "few.inter").write_text("\n".join(lines))
    output = run(tmp_path / "few.inter", "--length", 2, "--length", 6)
    assert row_of(output, "2")[2] == f"{3 / 2:.2f}" and row_of(output, "6")[2] == f"{7 / 3:.2f}"


def test_windows_are_spread_over_the_stream() -> None:
    assert [int(w[0]) for w in windows(np.arange(1000), 10, 3)] == [0, 500, 990]
    assert windows(np.arange(5), 10, 3) == []


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "floats.npy", np.zeros(3))
    for name, match in (
        ("text.txt", "tokenizer"),
        ("odd.bin", "no multiple"),
        ("floats.npy", "integers"),
        ("none.npy", "not a file"),
    ):
        with pytest.raises(ValueError, match=match):
            read_ids(tmp_path / name)
        result = CliRunner().invoke(app, ["analyze", str(tmp_path / name)])
        assert result.exit_code == 2 and "Traceback" not in result.output
    np.save(tmp_path / "short.npy", np.arange(3))
    result = CliRunner().invoke(app, ["analyze", str(tmp_path / "short.npy"), "--length", "4"])
    assert result.exit_code == 2 and "--length is 4" in result.output


SMALL = "user_id:token\titem_id:token\ttimestamp:float\n" + "a\tx\t1\n"


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (SMALL, ["--columns", "genre"], "--columns: 'genre' is not a column of"),
        (SMALL, ["--columns", "genre"], "pass --item if it is a column of an .item file"),
        (SMALL, ["--user-column", "uid"], "--user-column='uid' is not a column of"),
        (SMALL, ["--item-column", "iid"], "--item-column='iid' is not a column of"),
        (SMALL, ["--time-column", "when"], "--time-column='when' is not a column of"),
        (SMALL, ["--time-column", "item_id"], "--time-column='item_id' of"),
        (SMALL, ["--item", "none.item"], "none.item is not a file"),
        (SMALL, ["--length", "0"], "Invalid value for '--length'"),
        (SMALL.splitlines()[0], [], "holds no interactions"),
        ("", [], "line 1 of"),
        ("", [], "is empty; an atomic file starts with tab-separated name:type fields"),
    ],
)
def test_mistakes_are_named_by_the_options_typed(content: str, arguments: list[str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    path.write_text(content)
    output = refused(path, *arguments)
    assert says in output and "item_path" not in output, output


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_bytes(b"1 2 3")
    (tmp_path / "ids.bin").write_bytes(b"1234")
    assert "is no array as numpy.save writes it" in refused(tmp_path / "text.npy")
    for name in ("empty.npy", "empty.bin"):
        (tmp_path / name).touch()
        assert f"{name} is empty" in refused(tmp_path / name)
    assert "dtype is 'int33'" in refused(tmp_path / "ids.bin", "--dtype", "int33")


def refused(*arguments: object) -> str:
    """The message, in one line."""
    result = CliRunner().invoke(app, ["analyze", *map(str, arguments)])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return " ".join(result.output.replace("│", " ").split())
