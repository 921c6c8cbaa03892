"""Files, tokenizer and sequences of source text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ta_plugin.data.text import END, TokenStream, source_files, split_files, train_tokenizer


def write(root: Path, folders: int, files: int) -> None:
    for folder in range(folders):
        (root / f"part{folder:02}").mkdir(parents=True)
        for file in range(files):
            (root / f"part{folder:02}" / f"f{file}.py").write_text(
                f"def f{file}(x):\n    return x + {folder}  # é\n" * 20
            )


def test_stream_decodes_to_the_files_in_path_order(tmp_path: Path) -> None:
    write(tmp_path, 2, 3)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("never read")
    files = source_files(tmp_path)
    tokenizer = train_tokenizer(files, 300)
    stream = TokenStream.of(files, tokenizer)
    documents = tokenizer.decode(stream.ids.tolist(), skip_special_tokens=False).split(END)
    assert documents[:-1] == [path.read_text() for path in files] and documents[-1] == ""
    assert int(stream.ids.max()) < stream.vocab_size


def test_sequences_overlap_by_their_targets_only() -> None:
    stream = TokenStream(torch.arange(20), 20)
    assert [s[0].tolist() for s in stream.in_order(8)] == [list(range(0, 9)), list(range(8, 17))]
    drawn = stream.random(50, 19, torch.Generator().manual_seed(0))
    assert (drawn == torch.arange(20)).all()  # the one place there is
    with pytest.raises(ValueError, match="holds 20 ids; sequences of 20 need at least 21"):
        stream.random(1, 20, torch.Generator())


def test_held_out_folders_share_no_file_with_training(tmp_path: Path) -> None:
    write(tmp_path, 12, 2)
    train, held = split_files(source_files(tmp_path), every=5)
    assert not set(train) & set(held) and len(train) + len(held) == 24
    assert {path.parent.name for path in held} == {"part04", "part09"}
    train, held = split_files(source_files(tmp_path)[:2], every=2)  # one folder only
    assert len(train) == len(held) == 1


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no file \*\.py"):
        source_files(tmp_path)
