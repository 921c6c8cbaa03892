"""A transformer over distinct rows: attention, norm, MLP and residual all act on U rows, never on L positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ta_plugin.attention import Scoring
from ta_plugin.strategies import OwnedRows, row_attention
from ta_plugin.unique_space import UniqueSpace


class RecencyBias(nn.Module):
    """A learned bias per head from how long ago an occurrence was, by time and by rank from the end, in logarithmic buckets.

    Exact in unique space: one query time per sample makes it a per-occurrence bias, which folds (DESIGN section 3).
    """

    def __init__(self, num_heads: int, *, unit_seconds: float = 60.0, buckets: int = 24) -> None:
        super().__init__()
        self.unit_seconds, self.buckets = unit_seconds, buckets
        self.by_age = nn.Parameter(torch.zeros(buckets, num_heads))
        self.by_rank = nn.Parameter(torch.zeros(buckets, num_heads))

    def forward(self, ages: Tensor, lengths: Tensor) -> Tensor:
        """ages (B, L) seconds, lengths (B,) -> (B, L, H)."""
        position = torch.arange(ages.shape[1], device=ages.device)
        rank = (lengths[:, None] - 1 - position).clamp(min=0)
        return self.by_age[self._bucket(ages / self.unit_seconds)] + self.by_rank[self._bucket(rank.to(ages.dtype))]

    def _bucket(self, x: Tensor) -> Tensor:
        return torch.log2(1 + x).mul(1.5).long().clamp(max=self.buckets - 1)


class ActionTerm(nn.Module):
    """A learned vector per action and head (rated 5, bought, skipped), added to the value of an occurrence."""

    def __init__(self, num_actions: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_actions, num_heads, head_dim))

    def forward(self, actions: Tensor) -> Tensor:
        """actions (B, L) int64 -> (B, L, H, D)."""
        return self.weight[actions]


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer on distinct rows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self,
        rows: Tensor,
        space: UniqueSpace | OwnedRows,
        bias: Tensor | None,
        value_term: Tensor | None,
        scoring: Scoring,
    ) -> Tensor:
        """rows (U, D) -> (U, D)."""
        heads = (rows.shape[0], self.num_heads, rows.shape[1] // self.num_heads)
        q, k, v = (x.reshape(heads) for x in self.qkv(self.attention_norm(rows)).chunk(3, -1))
        mixed = row_attention(space, q, k, v, bias=bias, value_term=value_term, scoring=scoring)
        rows = rows + self.out(mixed.flatten(1))
        return rows + self.mlp(self.mlp_norm(rows))


class HistoryEncoder(nn.Module):
    """k tokenized self-attention layers with a recency bias and an action value term in each."""

    def __init__(
        self, dim: int, num_heads: int, num_layers: int, *, num_actions: int, recency: bool = True, action: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads) for _ in range(num_layers))
        self.recency = nn.ModuleList(RecencyBias(num_heads) for _ in range(num_layers)) if recency else None
        head_dim = dim // num_heads
        self.action = (
            nn.ModuleList(ActionTerm(num_actions, num_heads, head_dim) for _ in range(num_layers)) if action else None
        )
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, rows: Tensor, space: UniqueSpace, ages: Tensor, actions: Tensor, lengths: Tensor, scoring: Scoring
    ) -> Tensor:
        """Distinct rows (U, D) of a batch with ages (B, L), actions (B, L), lengths (B,) -> (U, D)."""
        for i, layer in enumerate(self.layers):
            bias = None if self.recency is None else self.recency[i](ages, lengths)
            term = None if self.action is None else self.action[i](actions)
            rows = layer(rows, space, bias, term, scoring)
        return self.norm(rows)
