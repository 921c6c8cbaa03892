"""FASTA records, and the k-mers of bases."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.data.fasta import kmer_bases, kmer_ids, read_fasta

TEXT = b">one first record\nACGT\nacgtu\n\n>two\nNNAC\r\n>empty\n"


@pytest.mark.parametrize("suffix", ["fa", "fa.gz"])
def test_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"small.{suffix}"
    path.write_bytes(gzip.compress(TEXT) if suffix.endswith("gz") else TEXT)
    records = {name: bases.tolist() for name, bases in read_fasta(path).items()}
    assert records == {"one": [0, 1, 2, 3, 0, 1, 2, 3, 3], "two": [4, 4, 0, 1], "empty": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ACGT\n", "line 1: text before the first '>'"),
        (b">a\nACGT\nAC-GT\n", "line 3: '-' is no nucleotide code"),
        (b">a\nAC\n>a\nGT\n", "line 3: record 'a' occurs twice"),
        (b"", "holds no record"),
    ],
)
def test_what_is_no_fasta(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "bad.fa").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_fasta(tmp_path / "bad.fa")


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 31))
def test_kmers_are_the_windows_of_the_bases(bases: list[int], k: int) -> None:
    ids = kmer_ids(torch.tensor(bases, dtype=torch.uint8), k)
    windows = [bases[i : i + k] for i in range(len(bases) - k + 1)]
    assert ids.numel() == len(windows)
    back = kmer_bases(ids, k)
    for window, number, decoded in zip(windows, ids.tolist(), back.tolist(), strict=True):
        assert number == -1 if 4 in window else decoded == window


def test_k_beyond_an_int64() -> None:
    with pytest.raises(ValueError, match=r"k is 32; it must lie in \[1, 31\]"):
        kmer_ids(torch.zeros(40, dtype=torch.uint8), 32)
