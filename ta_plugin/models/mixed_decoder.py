"""A causal language model of sliding-window rotary layers in which every n-th layer is token-keyed and global."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ta_plugin.attention import CausalChunks, DecayKind, choose_chunk
from ta_plugin.models.decode_cache import DecodeCache
from ta_plugin.models.rotary import RotaryAttention, WindowCache
from ta_plugin.models.token_keyed import TokenKeyedAttention
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, Halo, pieces_of
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class MixedDecoderConfig:
    """Sizes and options of `MixedDecoder`.

    global_every: every n-th layer is token-keyed and sees everything before it; 0: none is, all are rotary
    window:       positions that a rotary layer sees; None: all
    value_tables: token-keyed values come from a table per layer instead of a projection of the embedding
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int | None = None
    global_every: int = 3
    window: int | None = 256
    decay: DecayKind = "learned"
    value_tables: bool = False
    mlp_ratio: int = 4


class MixedLayer(nn.Module):
    """Pre-norm attention and MLP. `token_keyed` decides which attention."""

    def __init__(self, config: MixedDecoderConfig, token_keyed: bool) -> None:
        super().__init__()
        dim = config.dim
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention: TokenKeyedAttention | RotaryAttention
        if token_keyed:
            self.attention = TokenKeyedAttention(
                dim,
                config.num_heads,
                num_kv_heads=config.num_kv_heads,
                value_vocab=config.vocab_size if config.value_tables else None,
                decay=config.decay,
            )
        else:
            self.attention = RotaryAttention(
                dim, config.num_heads, num_kv_heads=config.num_kv_heads, window=config.window
            )
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.mlp_ratio * dim, bias=False),
            nn.GELU(),
            nn.Linear(config.mlp_ratio * dim, dim, bias=False),
        )

    def forward(self, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden (n, dim) -> (n, dim), `attend` being this layer's attention with what else it needs."""
        hidden = hidden + attend(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class MixedDecoder(nn.Module):
    """Embedding, mixed layers and tied output over packed documents.

    Token-keyed layers read the embedding's rows of the distinct tokens; the plan (`CausalChunks`) is built once for all of them.
    """

    def __init__(self, config: MixedDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        every = config.global_every
        self.layers = nn.ModuleList(
            MixedLayer(config, every > 0 and (n + 1) % every == 0) for n in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim)

    def plan(self, tokens: Tensor, cu_seqlens: Tensor | None = None, chunk: int | None = None) -> CausalChunks:
        """tokens (M,) int64 of documents bounded by cu_seqlens (B + 1,), one document by default, cut into chunks."""
        space = UniqueSpace.from_packed(tokens, cu_seqlens)
        if chunk is None:
            heads, decayed = self.config.num_heads, self.config.decay != "none"
            chunk = choose_chunk(space, heads, self.config.dim // heads, tokens.device, decayed).size
        return CausalChunks.of(space, chunk)

    def plan_over_ranks(
        self,
        tokens: Tensor,
        lengths: Tensor,
        group: SSPGroup,
        *,
        places: Sequence[Sequence[int]] | None = None,
        chunk: int | None = None,
    ) -> SplitSequence:
        """This rank's pieces of samples that lie over the group (layout "sequence"), for `over_ranks`. Collective.

        tokens:  (B, P, L) int64, P pieces of each sample; lengths: (B, P) int64, of any size
        places:  of every rank's pieces in the sequence, by default `zigzag`, whose P is 2

        Raises ValueError on every rank for what is wrong on one, and for rotary layers without a window.
        """
        config, error, reader = self.config, None, None
        heads, rotary = config.num_heads, config.global_every != 1
        try:
            if rotary and config.window is None:
                raise ValueError(
                    "window is None; over ranks rotary layers need a sliding window, or global_every=1 to have none of them"
                )
            if tokens.dim() != 3 or lengths.shape != tokens.shape[:2]:
                raise ValueError(
                    f"tokens have shape {tuple(tokens.shape)}, lengths {tuple(lengths.shape)}; pass (B, P, L) and (B, P)"
                )
            reader = pieces_of(tokens, lengths)
            if reader.num_rows and not 0 <= int(reader.tokens.min()) <= int(reader.tokens.max()) < config.vocab_size:
                raise ValueError(
                    f"tokens lie in [{int(reader.tokens.min())}, {int(reader.tokens.max())}]; pass ids in [0, {config.vocab_size})"
                )
            if chunk is None:
                decayed = config.decay != "none"
                chunk = choose_chunk(reader, heads, config.dim // heads, tokens.device, decayed).size
            elif chunk < 1:
                raise ValueError(f"chunk is {chunk}; pass 1 or more")
        except ValueError as failure:
            error = failure
        exchange_header(group, [], error)
        assert reader is not None and chunk is not None
        rows = CausalRows.of(reader, HashOwners(group.size), group, places).with_chunks(chunk)
        return SplitSequence(rows, Halo.of(rows, config.window - 1) if rotary and config.window is not None else None)

    def over_ranks(self, split: SplitSequence) -> Tensor:
        """Logits (M, vocab) of what follows each position of this rank's pieces, packed as `split.pack` packs. Collective.

        Equal to `forward` over the whole samples. Each rank's backward leaves its share of the gradients: their sum over the group is
        that of the summed losses.
        """
        hidden, rows = self.embedding(split.rows.tokens), self.embedding(split.rows.owned.space.tokens)
        for layer in self.layers:
            hidden = layer(hidden, split.attention(layer.attention, rows))
        return self._logits(hidden)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        plan: CausalChunks | None = None,
        cache: DecodeCaches | None = None,
    ) -> Tensor:
        """Logits (M, vocab) of what follows each of tokens (M,). cache: a new one, to be filled with these prompts."""
        plan = self.plan(tokens, cu_seqlens) if plan is None else plan
        hidden, rows = self.embedding(tokens), self.embedding(plan.space.tokens)
        if cache is not None:
            cache.tokens.prefill(plan.space)
        for n, layer in enumerate(self.layers):
            hidden = layer(hidden, self._attend(n, rows, plan, cache))
        return self._logits(hidden)

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: DecodeCaches) -> Tensor:
        """One more token of each sample, (B,) -> logits (B, vocab): equal to the last row that `forward` gives for all of them."""
        cache.tokens.append(tokens)
        hidden = rows = self.embedding(tokens)
        for n, layer in enumerate(self.layers):
            hidden = layer(hidden, self._attend_newest(n, rows, cache))
        return self._logits(hidden)

    def cache(self, batch: int) -> DecodeCaches:
        """An empty cache for `batch` samples decoded side by side."""
        device = self.embedding.weight.device
        windows = {
            n: WindowCache(batch, self.config.window, device)
            for n, layer in enumerate(self.layers)
            if isinstance(layer.attention, RotaryAttention)
        }
        return DecodeCaches(DecodeCache(batch, self.config.vocab_size, device), windows)

    def _attend(
        self, n: int, rows: Tensor, plan: CausalChunks, cache: DecodeCaches | None
    ) -> Callable[[Tensor], Tensor]:
        attention = self.layers[n].attention
        if isinstance(attention, TokenKeyedAttention):
            return partial(attention, rows=rows, chunks=plan, cache=None if cache is None else cache.tokens.layer(n))
        assert isinstance(attention, RotaryAttention)
        return partial(attention, space=plan.space, cache=None if cache is None else cache.windows[n])

    def _attend_newest(self, n: int, rows: Tensor, cache: DecodeCaches) -> Callable[[Tensor], Tensor]:
        attention = self.layers[n].attention
        if isinstance(attention, TokenKeyedAttention):
            return partial(attention.step, rows=rows, cache=cache.tokens.layer(n))
        assert isinstance(attention, RotaryAttention)
        return partial(attention.step, cache=cache.windows[n])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) @ self.embedding.weight.T


@dataclass(frozen=True)
class DecodeCaches:
    """Of a mixed stack: one cache for all token-keyed layers, and a window per rotary layer."""

    tokens: DecodeCache
    windows: dict[int, WindowCache]


@dataclass(frozen=True)
class SplitSequence:
    """What a mixed stack needs of samples whose pieces lie on several ranks. Made by `MixedDecoder.plan_over_ranks`.

    rows: for token-keyed layers; halo: for rotary layers within a window, None where there are none
    """

    rows: CausalRows
    halo: Halo | None

    def pack(self, values: Tensor) -> Tensor:
        """Per-position values (B, P, L, ...) of this rank's pieces to (M, ...), in the order of the logits."""
        return self.rows.owned.reader.pack(values.transpose(0, 1).flatten(0, 1))

    def attention(self, attention: object, rows: Tensor) -> Callable[[Tensor], Tensor]:
        """A layer's attention as a function of hidden states alone; rows (U_n, dim) of the owned tokens."""
        if isinstance(attention, TokenKeyedAttention):
            return partial(attention.over_ranks, rows=rows, plan=self.rows)
        assert isinstance(attention, RotaryAttention) and self.halo is not None
        return partial(attention.over_ranks, halo=self.halo)
