"""Reader of RecBole atomic files: tab-separated text whose header names and types every column.

The first line reads `name:type<TAB>name:type...`, with types `token`, `token_seq`, `float` and `float_seq`; every other
line is one row. Text is UTF-8 and taken verbatim (quotes mean nothing); the values of a sequence are separated by
single spaces. Empty lines are skipped, and lines may end in CR LF.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

COLUMN_TYPES = ("token", "token_seq", "float", "float_seq")
_BLOCK_BYTES = 4 << 20  # small enough that the work on one block stays near the cache
_WIDEST_FIXED = 64  # bytes; longer text goes to object arrays, where one long value does not widen all the others
_TAB, _NEWLINE, _RETURN = 9, 10, 13


@dataclass(frozen=True)
class AtomicFile:
    """Columns of one atomic file, in memory.

    Attributes:
        path: where they were read.
        n_rows: number of rows.
        types: column name -> `token`, `token_seq`, `float` or `float_seq`, for the columns read.
        columns: column name -> array `(n_rows,)`. A `float` column is float64, with NaN where the field is empty.
            All others hold text: numpy `str` (`<U`), or `object` of `str` where a value takes more than 64 bytes. A
            sequence is kept as the one string it was written as; `split` takes it apart.
    """

    path: Path
    n_rows: int
    types: dict[str, str]
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """The column `name`, `(n_rows,)`. Raises ValueError where it was not read."""
        if name not in self.columns:
            raise ValueError(f"column {name!r} was not read from {self.path}; columns read: {', '.join(self.columns)}")
        return self.columns[name]

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Takes a `token_seq` or `float_seq` column apart.

        Returns:
            `(offsets, values)`: offsets int64 `(n_rows + 1,)`; row i holds `values[offsets[i]:offsets[i + 1]]`, `str`
            for `token_seq` and float64 for `float_seq`. An empty field has no values.
        """
        column = self[name]
        kind = self.types[name]
        if not kind.endswith("_seq"):
            raise ValueError(f"column {name!r} of {self.path} has type {kind}; only a token_seq or float_seq splits")
        rows = [text.split(" ") if text else [] for text in column.tolist()]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = [value for row in rows for value in row]
        if kind == "token_seq":
            return offsets, np.array(flat, dtype=str)
        try:
            return offsets, np.array([float(value) for value in flat], dtype=np.float64)
        except ValueError as error:
            raise ValueError(f"column {name!r} of {self.path} is a float_seq, but {error}; correct the file") from None


def atomic_columns(path: str | PathLike[str]) -> dict[str, str]:
    """Reads only the header: column name -> type, in the order of the file.

    Raises:
        ValueError: there is no such file, or its first line is not a header of `name:type` fields.
    """
    with _open(path) as stream:
        return _parse_header(stream.readline(), Path(path))


def read_atomic(path: str | PathLike[str], columns: Sequence[str] | None = None) -> AtomicFile:
    """Reads an atomic file, whole or only some of its columns.

    Args:
        path: the `.inter`, `.item` or `.user` file (any extension is accepted).
        columns: names of the columns to keep, without their types; None keeps all.

    Raises:
        ValueError: no such file, a malformed header, an unknown column (the message lists those there are), or a
            malformed line (the message gives its number, counted from 1 at the header): wrong number of fields, text
            in a float column, bytes that are not UTF-8, NUL bytes.
    """
    path = Path(path)
    with _open(path) as stream:
        types = _parse_header(stream.readline(), path)
        chosen = _choose(types, columns, path)
        names = list(types)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
        n_rows = 0
        for block, first_line in _blocks(stream):
            data, starts, ends, lines = _fields(block, len(names), first_line, path)
            n_rows += len(lines)
            for name in chosen:
                index = names.index(name)
                parse = _floats if types[name] == "float" else _strings
                parts[name].append(parse(data, starts[:, index], ends[:, index], lines, f"column {name!r} of {path}"))
    empty = {name: np.empty(0, dtype=np.float64 if types[name] == "float" else "U1") for name in chosen}
    # the empty array comes last and only sets the dtype of a file without rows
    arrays = {name: np.concatenate([*parts[name], empty[name]]) for name in chosen}
    return AtomicFile(path=path, n_rows=n_rows, types={name: types[name] for name in chosen}, columns=arrays)


def _open(path: str | PathLike[str]) -> BinaryIO:
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; pass the path of an atomic file (.inter, .item or .user)")
    return open(path, "rb")


def _parse_header(line: bytes, path: Path) -> dict[str, str]:
    try:
        text = line.removeprefix(codecs.BOM_UTF8).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"line 1 of {path} is not UTF-8 ({error}); save the file as UTF-8") from None
    if not text:
        raise ValueError(f"line 1 of {path} is empty; an atomic file starts with tab-separated name:type fields")
    types: dict[str, str] = {}
    for field in text.split("\t"):
        name, colon, kind = field.rpartition(":")
        if not colon or not name or kind not in COLUMN_TYPES:
            raise ValueError(
                f"line 1 of {path} has the field {field!r}; an atomic file starts with tab-separated name:type fields, "
                f"with a type of {', '.join(COLUMN_TYPES)}"
            )
        if name in types:
            raise ValueError(f"line 1 of {path} names the column {name!r} twice; rename one of them")
        types[name] = kind
    return types


def _choose(types: dict[str, str], columns: Sequence[str] | None, path: Path) -> list[str]:
    if columns is None:
        return list(types)
    if isinstance(columns, str):
        raise ValueError(f"columns={columns!r} is one string; pass a sequence of names, such as [{columns!r}]")
    for name in columns:
        if name not in types:
            raise ValueError(f"columns: {name!r} is not a column of {path}, which has {', '.join(types)}")
    return list(dict.fromkeys(columns))


def _blocks(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The rest of the stream in whole lines, about `_BLOCK_BYTES` at a time, with the number of each first line."""
    line, carried = 2, []
    while chunk := stream.read(_BLOCK_BYTES):
        cut = chunk.rfind(b"\n") + 1
        if cut == 0:
            carried.append(chunk)
            continue
        block = b"".join([*carried, chunk[:cut]])
        yield block, line
        line += block.count(b"\n")
        carried = [chunk[cut:]]
    rest = b"".join(carried)
    if rest:
        yield rest + b"\n", line


def _fields(
    block: bytes, n_columns: int, first_line: int, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The bytes, where each field starts and ends `(rows, n_columns)`, and the line number of each row `(rows,)`."""
    if (nul := block.find(b"\0")) >= 0:
        line = first_line + block.count(b"\n", 0, nul)
        raise ValueError(f"line {line} of {path} holds a NUL byte; atomic files are UTF-8 text, remove it")
    data = np.frombuffer(block, dtype=np.uint8)
    separators = np.flatnonzero((data == _TAB) | (data == _NEWLINE))
    last = np.flatnonzero(data[separators] == _NEWLINE)  # index, in `separators`, of the end of every line
    newlines = separators[last]
    line_starts = np.concatenate([[0], newlines[:-1] + 1])
    line_ends = newlines - ((newlines > line_starts) & (data[newlines - 1] == _RETURN))
    n_fields = np.diff(last, prepend=-1)
    blank = line_ends == line_starts if n_columns > 1 else np.zeros(len(last), dtype=bool)
    wrong = np.flatnonzero((n_fields != n_columns) & ~blank)
    if len(wrong):
        raise ValueError(
            f"line {first_line + wrong[0]} of {path} has {n_fields[wrong[0]]} tab-separated fields, but the header "
            f"has {n_columns}; correct that line"
        )
    rows = np.flatnonzero(~blank)
    ends = np.delete(separators, last[blank]).reshape(len(rows), n_columns)
    starts = np.empty_like(ends)
    starts[:, 0] = line_starts[rows]
    starts[:, 1:] = ends[:, :-1] + 1
    ends[:, -1] = line_ends[rows]
    return data, starts, ends, first_line + rows


def _fixed_width(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """The fields as numpy bytes `(rows,)` of dtype `S<width>`."""
    characters = np.zeros((len(starts), width), dtype=np.uint8)
    for offset in range(width):
        position = np.minimum(starts + offset, len(data) - 1)
        characters[:, offset] = np.where(offset < lengths, data[position], 0)
    return characters.reshape(-1).view(f"S{width}")


def _strings(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray, what: str) -> np.ndarray:
    lengths = ends - starts
    width = max(1, int(lengths.max(initial=0)))
    try:
        if width > _WIDEST_FIXED:
            values = np.empty(len(starts), dtype=object)
            values[:] = [data[a:b].tobytes().decode("utf-8") for a, b in zip(starts, ends, strict=True)]
            return values
        fixed = _fixed_width(data, starts, lengths, width)
        if fixed.view(np.uint8).max(initial=0) < 128:
            return fixed.astype(f"U{width}")  # a cast of ASCII bytes is far faster than decoding
        return np.char.decode(fixed, "utf-8")
    except UnicodeDecodeError:
        for a, b, line in zip(starts, ends, lines, strict=True):
            field = data[a:b].tobytes()
            if field.decode("utf-8", "replace").encode("utf-8") != field:
                raise ValueError(f"line {line}: {what} is not UTF-8: {field!r}; save the file as UTF-8") from None
        raise


def _floats(data: np.ndarray, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray, what: str) -> np.ndarray:
    lengths = ends - starts
    width = max(3, int(lengths.max(initial=0)))
    try:
        fixed = _fixed_width(data, starts, lengths, min(width, _WIDEST_FIXED))
        fixed[lengths == 0] = b"nan"
        if width <= _WIDEST_FIXED:
            return fixed.astype(np.float64)
    except ValueError:
        pass  # found again below, with its line
    values = np.full(len(starts), np.nan)
    for row in np.flatnonzero(lengths):
        field = data[starts[row] : ends[row]].tobytes().decode("utf-8", "replace")
        try:
            values[row] = float(field)
        except ValueError:
            raise ValueError(f"line {lines[row]}: {what} is a float, but reads {field!r}; correct that line") from None
    return values
