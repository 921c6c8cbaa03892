"""Causal attention whose keys and values belong to the token, so that it stays exact in unique space at any depth.

An architecture choice, not a drop-in for a pretrained rotary model: a key says which token stands there, never what the layers
below made of it; where it stands enters by the decay, and what came before by the query.
"""

from __future__ import annotations

from torch import Tensor, nn

from ta_plugin.attention import CausalChunks, DecayKind, HeadDecay, causal_attention
from ta_plugin.models.decode_cache import LayerRows
from ta_plugin.strategies import CausalRows, causal_over_ranks


class TokenKeyedAttention(nn.Module):
    """Queries from the hidden state of each position, keys and values from each distinct token.

    dim:        width of the hidden states
    token_dim:  width of the token rows (the embedding) that keys and values are projected from; dim by default
    value_vocab: instead of projected, values are an embedding table of this many ids of their own
    decay:      as for `HeadDecay`
    deterministic, backend: of `causal_attention`
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        token_dim: int | None = None,
        value_vocab: int | None = None,
        decay: DecayKind = "none",
        deterministic: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; it must divide num_heads, {num_heads}")
        self.head_dim = head_dim or dim // num_heads
        token_dim = dim if token_dim is None else token_dim
        width = self.num_kv_heads * self.head_dim
        self.norm = nn.RMSNorm(token_dim)
        self.query = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(token_dim, width, bias=False)
        self.value = nn.Linear(token_dim, width, bias=False) if value_vocab is None else None
        self.value_table = None if value_vocab is None else nn.Embedding(value_vocab, width)
        self.output = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.decay = HeadDecay(decay, num_heads)
        self.deterministic, self.backend = deterministic, backend

    def forward(self, hidden: Tensor, rows: Tensor, chunks: CausalChunks, cache: LayerRows | None = None) -> Tensor:
        """hidden (M, dim) of the occurrences and rows (U, token_dim) of the distinct tokens of chunks.space -> (M, dim).

        cache: this layer's, to be filled with the prompt, after `DecodeCache.prefill`
        """
        k, v = self.keys_and_values(rows, chunks.space.tokens)
        decay = self.decay()
        if cache is not None:
            cache.prefill(chunks.space, k, v, decay=decay)
        out = causal_attention(
            chunks.space,
            self._queries(hidden),
            k,
            v,
            decay=decay,
            chunk=chunks,
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return self.output(out.flatten(1))

    def over_ranks(self, hidden: Tensor, rows: Tensor, plan: CausalRows) -> Tensor:
        """hidden (M, dim) of this rank's pieces of a sequence and rows (U_n, token_dim) of the tokens it owns -> (M, dim). Collective."""
        k, v = self.keys_and_values(rows, plan.owned.space.tokens)
        out, _ = causal_over_ranks(
            plan,
            self._queries(hidden),
            k,
            v,
            decay=self.decay(),
            deterministic=self.deterministic,
            backend=self.backend,
        )
        return self.output(out.flatten(1))

    def step(self, hidden: Tensor, rows: Tensor, cache: LayerRows) -> Tensor:
        """The newest position of each sample, after `DecodeCache.append`: hidden (B, dim), rows (B, token_dim) -> (B, dim)."""
        newest = cache.cache.tokens.gather(1, cache.cache.current[:, None]).squeeze(1)
        k, v = self.keys_and_values(rows, newest)
        out = cache.step(self._queries(hidden), k, v, decay=self.decay(), backend=self.backend)
        return self.output(out.flatten(1))

    def keys_and_values(self, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """rows (n, token_dim) of tokens (n,) -> k, v (n, Hk, D)."""
        normed = self.norm(rows)
        values = self.value(normed) if self.value is not None else self.value_table(tokens)  # type: ignore[misc]
        shape = (rows.shape[0], self.num_kv_heads, self.head_dim)
        return self.key(normed).view(shape), values.view(shape)

    def _queries(self, hidden: Tensor) -> Tensor:
        return self.query(hidden).view(hidden.shape[0], self.num_heads, self.head_dim)
