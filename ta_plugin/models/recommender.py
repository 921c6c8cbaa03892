"""A sequence recommender: a recent history encoded by self-attention, a long one attended by the targets at its owners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin.embedding import EmbeddingFn, SharedEmbedding
from ta_plugin.models.encoder import ActionTerm, HistoryEncoder, RecencyBias
from ta_plugin.tokenized_attention import TokenizedAttention
from ta_plugin.unique_space import UniqueSpace


@dataclass(frozen=True)
class RecommenderConfig:
    """Sizes and options of `SequenceRecommender`.

    vocab_size: rows of the table (items, and history tokens where they are not items); num_actions: action codes
    batch_size: samples per rank; recent_length and long_length: the last events the encoder and the long branch see
    recency, action: the ablations
    strategy:   of the long branch ("owner", "gather", "auto"); "positions" puts both branches on plain attention
    backend:    of the recent branch, chosen per call by default. On a GPU "reference" suits a few dozen events: what would be chosen
                for float32 compiles for minutes, one kind of shape after another
    """

    vocab_size: int
    num_actions: int
    batch_size: int
    recent_length: int = 50
    long_length: int = 200
    dim: int = 64
    num_heads: int = 2
    num_layers: int = 2
    recency: bool = True
    action: bool = True
    strategy: str = "owner"
    backend: str | None = None


class SequenceRecommender(nn.Module):
    """Scores targets given a history. Two attentions over the same table, both through `TokenizedAttention`:

    recent: the last `recent_length` events, gathered, run through a `HistoryEncoder` on distinct rows, then attended by the
            targets and by a learned query
    long:   the last `long_length` events, attended where their tokens are owned, by one learned query per sample: few queries
            over a long history are what the owner strategy is for

    table: embedding_fn over `vocab_size` ids with rows of width `dim`; it stays the caller's and is not registered here
    group: SSPGroup or process group
    """

    def __init__(self, config: RecommenderConfig, table: EmbeddingFn, *, group: Any = None, nranks: int = 1) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.num_heads
        plain = config.strategy == "positions"
        shared = SharedEmbedding(table)

        def attention(length: int, strategy: str, backend: str | None = None) -> TokenizedAttention:
            return TokenizedAttention(
                config.batch_size,
                length,
                nranks,
                shared,
                group=group,
                vocab_size=config.vocab_size,
                query=nn.Linear(dim, dim),
                key=nn.Linear(dim, dim),
                value=nn.Linear(dim, dim),
                output=nn.Linear(dim, dim),
                num_heads=heads,
                strategy=strategy,
                backend=backend,
            )

        self.recent = attention(config.recent_length, "positions" if plain else "gather", config.backend)
        self.long = attention(config.long_length, config.strategy)
        self.encoder = HistoryEncoder(
            dim, heads, config.num_layers, num_actions=config.num_actions, recency=config.recency, action=config.action
        )
        self.recency = nn.ModuleList(RecencyBias(heads) for _ in range(2)) if config.recency else None
        self.recent_action = ActionTerm(config.num_actions, heads, dim // heads) if config.action else None
        # in the long branch an action moves the weight of an occurrence, not its value: a value term would travel to the
        # owners at the width of the embedding
        self.long_action = nn.Parameter(torch.zeros(config.num_actions, heads)) if config.action else None
        self.recent_query, self.long_query = (nn.Parameter(torch.randn(dim) * dim**-0.5) for _ in range(2))
        self.of_user, self.of_target = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.popularity = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor, lengths: Tensor, ages: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """tokens, ages, actions (B, long_length), lengths (B,), targets (B, T) ids -> logits (B, T). Collective."""
        return self.score(tokens, lengths, ages, actions, self.long.embed(targets))

    def score(self, tokens: Tensor, lengths: Tensor, ages: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """As `forward`, with the targets' embeddings (B, T, dim). Collective."""
        one = (targets.shape[0], 1, -1)
        queries = torch.cat([self.recent_query.expand(one), targets], 1)
        recent = self._attend_recent(tokens, lengths, ages, actions, queries)
        long = self._attend_long(tokens, lengths, ages, actions, self.long_query.expand(one))
        user = self.of_user(recent[:, :1] + long) + self.of_target(recent[:, 1:])
        return (user * targets).sum(-1) + self.popularity(targets).squeeze(-1)

    def _attend_recent(self, tokens: Tensor, lengths: Tensor, ages: Tensor, actions: Tensor, queries: Tensor) -> Tensor:
        width = self.config.recent_length
        tokens, ages, actions, lengths = last_events(tokens, ages, actions, lengths=lengths, width=width)

        def encode(rows: Tensor, space: UniqueSpace) -> Tensor:
            return self.encoder(rows, space, ages, actions, lengths, self.recent.scoring)

        bias = None if self.recency is None else self.recency[0](ages, lengths)
        term = None if self.recent_action is None else self.recent_action(actions)
        return self.recent(tokens, lengths, queries=queries, bias=bias, value_term=term, encode=encode)

    def _attend_long(self, tokens: Tensor, lengths: Tensor, ages: Tensor, actions: Tensor, queries: Tensor) -> Tensor:
        biases = []
        if self.recency is not None:
            biases.append(self.recency[1](ages, lengths))
        if self.long_action is not None:
            biases.append(self.long_action[actions])
        return self.long(tokens, lengths, queries=queries, bias=sum(biases) if biases else None)


def last_events(*grids: Tensor, lengths: Tensor, width: int) -> list[Tensor]:
    """The last `width` valid events of each sample: grids (B, L) -> (B, width) each, and then their lengths (B,)."""
    kept = lengths.clamp(max=width)
    index = (lengths - kept)[:, None] + torch.arange(width, device=lengths.device)
    index = index.clamp(max=max(grids[0].shape[1] - 1, 0))
    return [*(grid.gather(1, index) for grid in grids), kept]


def sampled_softmax_loss(logits: Tensor, weights: Tensor, total_weight: float, num_ranks: int) -> Tensor:
    """Cross-entropy of the first target (the event that happened) against the sampled rest: logits (B, T), weights (B,).

    Scaled so that the mean over ranks is the mean over all samples of all ranks: `total_weight` is summed over ranks.
    """
    positive = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    per_sample = F.cross_entropy(logits, positive, reduction="none")
    return (per_sample * weights).sum() * (num_ranks / total_weight)
