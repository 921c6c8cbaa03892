"""What decoding keeps: for each distinct token a key and a value per layer, and how often, or how recently, it occurred."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ta_plugin.attention import weighted_attention
from ta_plugin.unique_space import UniqueSpace


class DecodeCache:
    """The distinct tokens of B samples decoded side by side, for token-keyed layers. Memory grows with them, not with length.

    batch: B; vocab_size: ids lie below it (a map of B x vocab_size int32 finds a token's row)

    tokens:  (B, W) int64, each sample's distinct tokens by first occurrence; W grows by doubling
    counts:  (B, W) int64, 0 past a sample's last row
    sizes, lengths: (B,) int64, distinct tokens and occurrences so far
    """

    def __init__(self, batch: int, vocab_size: int, device: torch.device | None = None) -> None:
        self.batch, self.vocab_size = batch, vocab_size
        self.row_of = torch.full((batch, vocab_size), -1, dtype=torch.int32, device=device)
        self.tokens, self.counts = (torch.zeros(batch, 64, dtype=torch.int64, device=device) for _ in range(2))
        self.sizes, self.lengths = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.current = self.sizes  # (B,), the row of each sample's newest token
        self.widest = 0  # rows in use
        self._layers: dict[Hashable, LayerRows] = {}

    def layer(self, key: Hashable) -> LayerRows:
        """The rows of one layer, made when first asked for."""
        return self._layers.setdefault(key, LayerRows(self))

    @torch.no_grad()
    def prefill(self, space: UniqueSpace) -> None:
        """Take over the B samples of a prompt; then give each layer its rows by `LayerRows.prefill`."""
        if self.widest or space.num_samples != self.batch:
            raise ValueError(
                f"prefill got {space.num_samples} samples for a cache of {self.batch} that holds {self.widest} rows; "
                "pass as many, to a new cache"
            )
        self._check(space.tokens)
        self.sizes = space.cu_seqlens.diff().long()
        self.lengths = space.cu_occurrences.diff()
        self._grow(int(self.sizes.max()) if self.batch else 0)
        at = self.places(space)
        self.tokens[at], self.counts[at] = space.tokens, space.counts
        self.row_of[at[0], space.tokens] = at[1].int()

    @torch.no_grad()
    def append(self, tokens: Tensor) -> None:
        """Count one more occurrence in each sample, tokens (B,) int64, before the layers' steps."""
        if tokens.shape != (self.batch,):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; pass one per sample, ({self.batch},)")
        self._check(tokens)
        sample = torch.arange(self.batch, device=tokens.device)
        row = self.row_of[sample, tokens].long()
        fresh = row < 0
        self.current = torch.where(fresh, self.sizes, row)
        self.sizes = self.sizes + fresh
        self._grow(int(self.sizes.max()) if self.batch else 0)
        self.row_of[sample, tokens] = self.current.int()
        self.tokens[sample, self.current] = tokens
        self.counts[sample, self.current] += 1
        self.lengths = self.lengths + 1

    def places(self, space: UniqueSpace) -> tuple[Tensor, Tensor]:
        """Sample and row within it of each row of a prompt's space, (U,) each."""
        sample = space.sample_of_rows()
        return sample, torch.arange(space.num_rows, device=sample.device) - space.cu_seqlens.long()[sample]

    def _grow(self, rows: int) -> None:
        self.widest = rows
        while self.tokens.shape[1] < rows:
            self.tokens, self.counts = _doubled(self.tokens, 0), _doubled(self.counts, 0)

    def _check(self, tokens: Tensor) -> None:
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens lie in [{int(tokens.min())}, {int(tokens.max())}]; they must lie in [0, {self.vocab_size}), the vocab_size "
                "of the cache"
            )


class LayerRows:
    """One layer's keys (B, W, Hk, D) and values (B, W, Hk, Dv), and with a decay its log weights (B, W, H) at each sample's newest time."""

    def __init__(self, cache: DecodeCache) -> None:
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.log: Tensor | None = None
        self.now: Tensor | None = None

    @torch.no_grad()
    def prefill(
        self, space: UniqueSpace, k: Tensor, v: Tensor, *, decay: Tensor | None = None, times: Tensor | None = None
    ) -> None:
        """k (U, Hk, D), v (U, Hk, Dv) of the prompt the cache was given; decay and times as for `causal_attention`."""
        at = self.cache.places(space)
        self._reserve(k, v, decay)
        assert self.keys is not None and self.values is not None
        self.keys[at], self.values[at] = k, v
        if decay is not None:
            assert self.log is not None
            times = space.positions() if times is None else times
            ends = space.cu_occurrences[1:] - 1
            last = times.new_zeros(self.cache.batch) if times.numel() == 0 else times[ends.clamp(min=0)]
            self.now = last.masked_fill(space.cu_occurrences.diff() == 0, 0)
            ages = (times - self.now[space.sample_of_occurrences()]).double()
            self.log[at] = space.as_packed().fold_bias(ages[:, None] * decay.double())

    @torch.no_grad()
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        decay: Tensor | None = None,
        times: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Attention of the newest token of each sample, q (B, H, D), k (B, Hk, D), v (B, Hk, Dv) -> (B, H, Dv).

        Call it once after every `DecodeCache.append`. Equal to the last position of `causal_attention` over all tokens so far.
        """
        cache = self.cache
        self._reserve(k, v, decay)
        assert self.keys is not None and self.values is not None
        sample = torch.arange(cache.batch, device=q.device)
        self.keys[sample, cache.current], self.values[sample, cache.current] = k, v  # known ones stay as they are
        if decay is None:
            weights = cache.counts[:, : cache.widest].to(torch.promote_types(q.dtype, torch.float32)).log()
        else:
            assert self.log is not None
            now = cache.lengths - 1 if times is None else times
            if self.now is not None:
                self.log -= ((now - self.now).double()[:, None] * decay.double())[:, None]
            self.now = now
            self.log[sample, cache.current] = torch.logaddexp(self.log[sample, cache.current], self.log.new_zeros(()))
            weights = self.log[:, : cache.widest].to(torch.promote_types(q.dtype, torch.float32))
        cu_q = torch.arange(cache.batch + 1, dtype=torch.int32, device=q.device)
        rows = [x[:, : cache.widest].flatten(0, 1) for x in (self.keys, self.values)]
        return weighted_attention(
            q, rows[0], rows[1], weights.flatten(0, 1), cu_q, cu_q * cache.widest, scale=scale, backend=backend
        )

    def _reserve(self, k: Tensor, v: Tensor, decay: Tensor | None) -> None:
        width = self.cache.tokens.shape[1]
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros(self.cache.batch, width, *x.shape[1:]) for x in (k, v))
            if decay is not None:
                self.log = torch.full(
                    (self.cache.batch, width, decay.numel()), -torch.inf, dtype=torch.float64, device=k.device
                )
        while self.keys.shape[1] < width:
            self.keys, self.values = _doubled(self.keys, 0), _doubled(self.values, 0)
            self.log = None if self.log is None else _doubled(self.log, -torch.inf)


def _doubled(x: Tensor, fill: float) -> Tensor:
    return torch.cat([x, torch.full_like(x, fill)], 1)
