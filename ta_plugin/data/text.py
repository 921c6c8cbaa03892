"""Source text as token ids: files of a folder, a byte-pair tokenizer trained on them, and sequences cut from their stream."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END = "<|end|>"  # closes every document
_LARGEST = 1 << 20  # bytes; larger files are tables rather than text


def source_files(folder: Path | None = None, pattern: str = "*.py") -> list[Path]:
    """Text files below `folder` in path order, without installed packages; the Python standard library by default.

    Raises ValueError where there are none.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = sorted(
        path
        for path in folder.rglob(pattern)
        if "site-packages" not in path.parts and path.is_file() and path.stat().st_size <= _LARGEST
    )
    if not files:
        raise ValueError(
            f"{folder} holds no file {pattern} of at most {_LARGEST:,} bytes; pass another folder or pattern"
        )
    return files


def train_tokenizer(files: list[Path], vocab_size: int) -> Any:
    """A byte-level byte-pair tokenizer (Hugging Face `tokenizers`) of at most `vocab_size` tokens, END among them."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_texts(files), vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return tokenizer


@dataclass(frozen=True)
class TokenStream:
    """ids (n,) int64: documents one after another, each closed by END; in path order, so that neighbours belong together."""

    ids: Tensor
    vocab_size: int

    @classmethod
    def of(cls, files: list[Path], tokenizer: Any) -> TokenStream:
        end = tokenizer.token_to_id(END)
        encoded = tokenizer.encode_batch(list(_texts(files)))
        ids = [torch.tensor([*document.ids, end]) for document in encoded]
        return cls(torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64), tokenizer.get_vocab_size())

    def sequences(self, starts: Tensor, length: int) -> Tensor:
        """(S, length + 1): from each of `starts` (S,), one more id than `length` for the last target."""
        return self.ids[starts[:, None] + torch.arange(length + 1)]

    def random(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """(count, length + 1) from random places. Raises ValueError where the stream is shorter."""
        if self.ids.numel() <= length:
            raise ValueError(
                f"the stream holds {self.ids.numel()} ids; sequences of {length} need at least {length + 1}"
            )
        return self.sequences(torch.randint(0, self.ids.numel() - length, (count,), generator=generator), length)

    def in_order(self, length: int) -> Iterator[Tensor]:
        """(1, length + 1) each: the stream cut into whole sequences."""
        for start in range(0, self.ids.numel() - length, length):
            yield self.sequences(torch.tensor([start]), length)


def split_files(files: list[Path], every: int = 10) -> tuple[list[Path], list[Path]]:
    """Training and held-out files: each folder's files stay together, and one folder in `every` is held out.

    Falls back to every `every`-th file where there are too few folders for that.
    """
    folders = sorted({path.parent for path in files})
    held = set(folders[every - 1 :: every])
    if held:
        return [f for f in files if f.parent not in held], [f for f in files if f.parent in held]
    return [f for i, f in enumerate(files) if (i + 1) % every], files[every - 1 :: every]


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")
