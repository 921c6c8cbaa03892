"""How often tokens repeat in samples of data: what decides whether attention over distinct tokens pays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ta_plugin.data.interactions import Interactions
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class Repeats:
    """Counts of some samples of at most `length` tokens.

    rows:          distinct tokens, counted per sample
    ids:           distinct tokens of all samples together
    pairs:         query-key pairs of self-attention on rows; position_pairs: over positions
    """

    length: int
    samples: int
    occurrences: int
    rows: int
    ids: int
    pairs: int
    position_pairs: int

    @classmethod
    def of(cls, samples: list[Tensor], length: int) -> Repeats:
        """samples: each (l,) int64, of which the last `length` tokens count. Raises ValueError where no sample has a token."""
        samples = [sample[-length:] for sample in samples]
        lengths = torch.tensor([sample.numel() for sample in samples])
        if not samples or int(lengths.sum()) == 0:
            raise ValueError("samples hold no token; pass at least one")
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        space = UniqueSpace.from_packed(torch.cat(samples), bounds)
        rows = space.cu_seqlens.long().diff()
        return cls(
            length=length,
            samples=len(samples),
            occurrences=space.num_occurrences,
            rows=space.num_rows,
            ids=space.tokens.unique().numel(),
            pairs=int(rows.square().sum()),
            position_pairs=int(lengths.square().sum()),
        )


def read_ids(path: Path, dtype: str = "uint16") -> np.ndarray:
    """Token ids of a `.npy` file, (n,) or (samples, length), or of a raw `.bin` file of `dtype`, (n,); memory-mapped, any integer.

    Raises ValueError for another ending, ids that are no integers, and an empty or cut-off file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; pass one that ends in .npy, .bin or .inter")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; pass a file that holds at least one id")
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} is no array as numpy.save writes it ({error}); save the ids anew") from None
    elif path.suffix == ".bin":
        try:
            item = np.dtype(dtype).itemsize
        except TypeError:
            raise ValueError(f"dtype is {dtype!r}, which numpy does not know; pass uint16, int32 or such") from None
        if path.stat().st_size % item:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, no multiple of the {item} of a {dtype}; name its dtype"
            )
        ids = np.memmap(path, dtype=dtype, mode="r")
    else:
        raise ValueError(
            f"{path} ends in {path.suffix!r}; pass ids as .npy or .bin, or RecBole's .inter (text needs a tokenizer first)"
        )
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim not in (1, 2) or ids.size == 0:
        raise ValueError(
            f"{path} holds {ids.dtype} of shape {ids.shape}; ids are integers (n,) or (samples, length), at least one"
        )
    return ids


def windows(ids: np.ndarray, length: int, most: int) -> list[Tensor]:
    """Up to `most` samples, evenly spread: windows of a stream (n,), or rows of (samples, L). Empty where none is so long."""
    if length > ids.shape[-1]:
        return []
    if ids.ndim == 2:
        return [torch.from_numpy(row.astype(np.int64)) for row in ids[_spread(len(ids), most)]]
    starts = _spread(len(ids) // length, most) * length
    return [torch.from_numpy(ids[start : start + length].astype(np.int64)) for start in starts]


def histories(data: Interactions, most: int) -> list[Tensor]:
    """Token histories of up to `most` users, evenly spread, oldest event first."""
    bounds = data.user_offsets
    return [torch.from_numpy(data.tokens[bounds[u] : bounds[u + 1]]) for u in _spread(data.n_users, most)]


def _spread(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
