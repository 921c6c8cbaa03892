"""FASTA files as bases, and bases as overlapping k-mers: the tokens of a genome."""

from __future__ import annotations

import gzip
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNKNOWN = 4  # every letter but A, C, G and T (and U, read as T): N and the other ambiguity codes
_CODES = np.full(256, 255, dtype=np.uint8)
for _code, _letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
    _CODES[[ord(x) for x in _letters]] = _code
_CODES[[ord(x) for x in "NRYSWKMBDHVnryswkmbdhv"]] = UNKNOWN
MAX_K = 31  # two bits a base, in an int64


def read_fasta(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Records of a FASTA file, plain or .gz: name (the header's first word) -> bases (n,) uint8, A C G T as 0 1 2 3, others 4.

    Raises ValueError, naming the file and line, for text before the first header, an unknown letter or a name used twice.
    """
    source = Path(path)
    data = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    records: dict[str, list[np.ndarray]] = {}
    parts: list[np.ndarray] | None = None
    for number, line in enumerate(data.splitlines(), 1):
        line = line.strip()
        if line.startswith(b">"):
            name = (line[1:].split() or [b""])[0].decode()
            if name in records:
                raise ValueError(f"{source}, line {number}: record {name!r} occurs twice; give each a name of its own")
            parts = records.setdefault(name, [])
        elif line:
            if parts is None:
                raise ValueError(f"{source}, line {number}: text before the first '>' header; pass a FASTA file")
            codes = _CODES[np.frombuffer(line, dtype=np.uint8)]
            if (codes == 255).any():
                letter = chr(line[int((codes == 255).argmax())])
                raise ValueError(
                    f"{source}, line {number}: {letter!r} is no nucleotide code; pass DNA or RNA without gaps"
                )
            parts.append(codes)
    if not records:
        raise ValueError(f"{source} holds no record; pass a FASTA file")
    return {
        name: torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.uint8))
        for name, parts in records.items()
    }


def kmer_ids(bases: Tensor, k: int) -> Tensor:
    """Every k-mer of bases (n,): (max(n - k + 1, 0),) int64 in [0, 4 ** k), the first base in the highest bits.

    -1 where the k-mer holds a base that is not 0 .. 3. Raises ValueError for k outside [1, 31].
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}; it must lie in [1, {MAX_K}], two bits a base in an int64")
    count = max(bases.numel() - k + 1, 0)
    ids = torch.zeros(count, dtype=torch.int64, device=bases.device)
    broken = torch.zeros(count, dtype=torch.bool, device=bases.device)
    for i in range(k):
        part = bases[i : i + count]
        ids.mul_(4).add_(part)
        broken |= part > 3
    return ids.masked_fill_(broken, -1)


def kmer_bases(ids: Tensor, k: int) -> Tensor:
    """The bases of k-mers: ids (n,) int64 -> (n, k) int64, the inverse of `kmer_ids`."""
    shifts = torch.arange(2 * (k - 1), -1, -2, device=ids.device)
    return ids[:, None] >> shifts & 3
