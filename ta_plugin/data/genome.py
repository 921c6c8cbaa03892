"""A genome as a multiset of k-mers, spans to predict, and what remains of the multiset when those spans are hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ta_plugin.data.fasta import UNKNOWN, kmer_ids

MASKED = 5  # in windows: a base to be predicted
BASE_CODES = 6  # A C G T, unknown or outside, masked


@dataclass(frozen=True)
class Genome:
    """bases (n,) uint8 of all records, one unknown base between two; k; its distinct k-mers and where they stand.

    kmers:  (U,) int64, the distinct k-mers, ascending
    rows:   (n - k + 1,) int64, the k-mer starting at each base as an index into `kmers`, -1 where it holds an unknown base
    counts: (U,) int64, how often each occurs
    """

    bases: Tensor
    k: int
    kmers: Tensor
    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, records: dict[str, Tensor], k: int) -> Genome:
        """From records as `read_fasta` gives them. Raises ValueError where they hold no k-mer."""
        gap = torch.tensor([UNKNOWN], dtype=torch.uint8)
        parts = [part for bases in records.values() for part in (gap, bases)]
        bases = torch.cat(parts[1:]) if parts else gap[:0]
        ids = kmer_ids(bases, k)
        known = ids >= 0
        if not known.any():
            raise ValueError(f"the records hold no {k}-mer of known bases; pass longer ones or a smaller k")
        kmers, inverse, counts = ids[known].unique(return_inverse=True, return_counts=True)
        return cls(bases, k, kmers, ids.masked_scatter(known, inverse), counts)

    def to(self, device: torch.device | str) -> Genome:
        return Genome(
            self.bases.to(device), self.k, self.kmers.to(device), self.rows.to(device), self.counts.to(device)
        )

    @property
    def num_occurrences(self) -> int:
        """L: k-mers in the genome."""
        return int(self.counts.sum())

    def hidden(self, starts: Tensor, length: int) -> Tensor:
        """Which k-mers overlap a span of `length` bases from any of `starts` (S,): (n - k + 1,) bool.

        A k-mer that holds one base of a span tells it, so all of them go: length + k - 1 a span.
        """
        touched = self._touched(starts, length)
        touched = touched[(touched >= 0) & (touched < self.rows.numel())]
        mask = torch.zeros(self.rows.numel(), dtype=torch.bool, device=starts.device)
        mask[touched] = True
        return mask

    def _touched(self, starts: Tensor, length: int) -> Tensor:
        """Where the k-mers begin that overlap a span, repeated where spans meet; outside the genome too."""
        return (starts[:, None] + torch.arange(1 - self.k, length, device=starts.device)).flatten()

    def counts_without(self, starts: Tensor, length: int) -> Tensor:
        """Counts (U,) int64 of the k-mers that overlap no span; each removed occurrence is removed once. Reads nothing back."""
        places = self._touched(starts, length).sort().values
        inside = (places >= 0) & (places < self.rows.numel())
        inside[1:] &= places[1:] != places[:-1]
        rows = self.rows[places.clamp(0, self.rows.numel() - 1)]
        gone = inside & (rows >= 0)
        return self.counts.index_add(0, rows.clamp(min=0), gone.long(), alpha=-1)

    def windows(self, starts: Tensor, length: int, flank: int) -> Tensor:
        """Bases around each span with the span masked: (S, flank + length + flank) int64, unknown outside the genome.

        Bases of other spans are masked too: nothing that is to be predicted shows anywhere.
        """
        hidden = torch.zeros(self.bases.numel(), dtype=torch.bool, device=starts.device)
        hidden[(starts[:, None] + torch.arange(length, device=starts.device)).flatten()] = True
        places = starts[:, None] + torch.arange(-flank, length + flank, device=starts.device)
        inside = (places >= 0) & (places < self.bases.numel())
        places = places.clamp(0, self.bases.numel() - 1)
        shown = self.bases[places].long().masked_fill(hidden[places], MASKED)
        return shown.masked_fill(~inside, UNKNOWN)

    def spans(self, count: int, length: int, first: int, last: int, generator: torch.Generator) -> Tensor:
        """Starts (count,) int64 of spans inside [first, last), drawn at random; known bases only where the genome has them."""
        if last - first < length:
            raise ValueError(f"[{first}, {last}) holds no span of {length} bases; give a longer range or shorter spans")
        return torch.randint(first, last - length + 1, (count,), generator=generator).to(self.bases.device)

    def targets(self, starts: Tensor, length: int) -> Tensor:
        """The bases of the spans (S, length) int64; 4 where unknown."""
        return self.bases[starts[:, None] + torch.arange(length, device=starts.device)].long()
