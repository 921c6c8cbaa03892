"""Predicting hidden bases from their neighbourhood and from a whole genome's k-mers, attended exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ta_plugin.attention import weighted_attention
from ta_plugin.data.fasta import kmer_bases
from ta_plugin.data.genome import BASE_CODES


class LocalWindow(nn.Module):
    """Dilated residual convolutions over a window of bases: positions are allowed here, this part is never tokenized."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BASE_CODES, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 5, padding=2 * 2**i, dilation=2**i) for i in range(layers))
        self.mixes = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))

    def forward(self, windows: Tensor) -> Tensor:
        """windows (S, W) base codes -> (S, W, dim)."""
        x = self.embed(windows)
        for norm, conv, mix in zip(self.norms, self.convs, self.mixes, strict=True):
            x = x + mix(nn.functional.gelu(conv(norm(x).transpose(1, 2)).transpose(1, 2)))
        return x


class GenomeModel(nn.Module):
    """Hidden bases attend to every k-mer of the genome: T queries x U distinct k-mers, exact for T x L occurrences.

    kmers:  (U,) int64, the distinct k-mers of `k` bases; a k-mer's embedding is the sum of its bases' at their places, and its own
    global_attention: False leaves the local window alone, for comparison
    """

    kmer_bases: Tensor

    def __init__(
        self,
        kmers: Tensor,
        k: int,
        *,
        dim: int = 128,
        num_heads: int = 4,
        layers: int = 4,
        global_attention: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.backend, self.global_attention = num_heads, backend, global_attention
        self.register_buffer("kmer_bases", kmer_bases(kmers, k), persistent=False)
        self.local = LocalWindow(dim, layers)
        self.of_place = nn.Parameter(torch.randn(k, 4, dim) * dim**-0.5)
        self.of_kmer = nn.Parameter(torch.zeros(kmers.numel(), dim))
        self.query_norm, self.mlp_norm, self.head_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, 4)

    def forward(self, windows: Tensor, counts: Tensor, length: int) -> Tensor:
        """windows (S, flank + length + flank) with the span masked, counts (U,) of visible k-mers -> logits (S, length, 4)."""
        flank = (windows.shape[1] - length) // 2
        hidden = self.local(windows)[:, flank : flank + length].flatten(0, 1)
        if self.global_attention:
            q, k, v = self.queries(hidden), *self.keys_values()
            hidden = hidden + self.out(self.attend(q, k, v, counts).flatten(1))
        hidden = hidden + self.mlp(self.mlp_norm(hidden))
        return self.head(self.head_norm(hidden)).view(windows.shape[0], length, 4)

    def queries(self, hidden: Tensor) -> Tensor:
        """Hidden bases (T, dim) -> (T, H, D)."""
        return self._heads(self.query(self.query_norm(hidden)))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Of every distinct k-mer: (U, H, D) each."""
        places = torch.arange(self.of_place.shape[0], device=self.of_place.device)
        rows = self.of_kmer + self.of_place[places, self.kmer_bases].sum(1)
        return self._heads(self.key(rows)), self._heads(self.value(rows))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """q (T, H, D) onto the k-mers, each weighted by the logarithm of how often it is visible; count 0 is absent."""
        # made on the device: a copy from the host would wait for it
        bounds_q, bounds_k = (torch.arange(2, dtype=torch.int32, device=q.device) * x.shape[0] for x in (q, k))
        log_counts = counts.to(torch.promote_types(q.dtype, torch.float32)).log()
        return weighted_attention(q, k, v, log_counts, bounds_q, bounds_k, backend=self.backend)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], self.num_heads, -1)
