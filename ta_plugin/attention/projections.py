"""From embeddings to heads: the query, key and value maps, and their absorption when queries are few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadProjections(nn.Module):
    """Maps rows (n, E) to queries (n, H, D), keys (n, Hk, D) and values (n, Hk, Dv); None takes the embedding itself.

    query, key, value: modules (n, E) -> (n, heads * head_dim), or None
    num_heads, num_kv_heads: H and Hk; Hk divides H
    """

    def __init__(
        self,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
        value: nn.Module | None = None,
        *,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.may_absorb = True  # False where an engine needs every rank to call the same modules (ZeRO)
        if num_heads < 1 or self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads, {num_heads}")

    def queries(self, rows: Tensor) -> Tensor:
        """(n, E) -> (n, H, D)."""
        return _heads(rows if self.query is None else self.query(rows), self.num_heads, "query")

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, E) -> (n, Hk, D), (n, Hk, Dv)."""
        k = _heads(rows if self.key is None else self.key(rows), self.num_kv_heads, "key")
        v = _heads(rows if self.value is None else self.value(rows), self.num_kv_heads, "value")
        return k, v

    @property
    def absorbable(self) -> bool:
        """Whether keys and values are linear in the embedding, so that their maps can move to the queries and the output.

        A norm on keys, or any other module, is not; the embedding itself needs no absorption.
        """
        return self.may_absorb and type(self.key) is nn.Linear and type(self.value) is nn.Linear

    @property
    def has_bias(self) -> bool:
        """Whether the key or value map adds a constant."""
        return any(getattr(m, "bias", None) is not None for m in (self.key, self.value))

    def absorption_pays(self, num_rows: int, num_queries: int, pairs: int) -> bool:
        """Whether absorbing costs fewer operations than projecting `num_rows` keys and values for `num_queries` queries.

        pairs: query-key pairs per head; absorbed, each takes E operations where it took D.
        """
        if not self.absorbable or not isinstance(self.key, nn.Linear) or not isinstance(self.value, nn.Linear):
            return False
        embed, k_width, v_width = self.key.in_features, self.key.out_features, self.value.out_features
        share = self.num_heads // self.num_kv_heads
        projected = num_rows * embed * (k_width + v_width) + pairs * share * (k_width + v_width)
        absorbed = num_queries * share * embed * (k_width + v_width) + pairs * self.num_heads * 2 * embed
        return absorbed < projected

    def absorb_queries(self, q: Tensor) -> Tensor:
        """q (Q, H, D) -> (Q, H, E + 1) with q.(W_k e + b_k) = (W_k^T q, q.b_k).(e, 1); (Q, H, E) without any bias."""
        return torch.einsum("qghd,gde->qghe", self._grouped(q), self._augmented(self.key)).flatten(1, 2)

    def unabsorb_values(self, out: Tensor) -> Tensor:
        """Weighted sums of (e, 1), out (Q, H, E + 1) -> W_v and b_v applied: (Q, H, Dv); of e alone without any bias."""
        return torch.einsum("qghe,gde->qghd", self._grouped(out), self._augmented(self.value)).flatten(1, 2)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.num_kv_heads, self.num_heads // self.num_kv_heads, x.shape[2])

    def _augmented(self, linear: nn.Module | None) -> Tensor:
        """Weight and bias per kv head, (Hk, D, E + 1), or the weight alone (Hk, D, E) where neither map has a bias."""
        assert isinstance(linear, nn.Linear)
        if not self.has_bias:
            return linear.weight.view(self.num_kv_heads, -1, linear.in_features)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        whole = torch.cat([linear.weight, bias[:, None]], 1)
        return whole.view(self.num_kv_heads, -1, whole.shape[1])


def with_one(rows: Tensor, spare: int = 0) -> Tensor:
    """Rows (n, E) as single-headed keys and values (n, 1, E + 1 + spare): the constant a bias needs, then zeros."""
    whole = F.pad(rows, (0, 1), value=1.0)
    return (F.pad(whole, (0, spare)) if spare else whole).unsqueeze(1)


def _heads(rows: Tensor, num_heads: int, name: str) -> Tensor:
    if rows.dim() != 2 or rows.shape[1] % num_heads:
        raise ValueError(
            f"{name} rows have shape {tuple(rows.shape)}; their width must be a multiple of the {num_heads} heads"
        )
    return rows.view(rows.shape[0], num_heads, rows.shape[1] // num_heads)
