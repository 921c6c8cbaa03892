"""From embeddings to heads: the query, key and value maps, and their absorption when queries are few."""

from __future__ import annotations

from typing import Any

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
        return as_heads(self._mapped("query", rows), self.num_heads, "query")

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, E) -> (n, Hk, D), (n, Hk, Dv)."""
        k = as_heads(self._mapped("key", rows), self.num_kv_heads, "key")
        v = as_heads(self._mapped("value", rows), self.num_kv_heads, "value")
        return k, v

    def _mapped(self, name: str, rows: Tensor) -> Tensor:
        module = getattr(self, name)
        if module is None:
            return rows
        if type(module) is nn.Linear:
            _check_map("queries" if name == "query" else "the embedding's rows", rows, name, module)
        return module(rows)

    def check_widths(self, asked: int | None, held: int | None, given: bool, dot: bool) -> None:
        """Raise ValueError where rows do not fit the maps, as far as widths are known.

        asked, held: E of what is mapped to queries, and to keys and values; None where it is not known
        given:       whether the caller passed `queries`, rather than ids whose rows the embedding gives
        dot:         whether scores are dot products, for which queries and keys share head_dim
        """
        q = self._head_dim("query", asked, self.num_heads, given)
        k = self._head_dim("key", held, self.num_kv_heads, False)
        self._head_dim("value", held, self.num_kv_heads, False)
        if not dot or q is None or k is None or q == k:
            return
        if given and self.query is None:
            raise ValueError(
                f"queries have width {asked}, a head_dim of {q} over {self.num_heads} head(s), but keys have {k}; pass queries of width "
                f"{k * self.num_heads}, or a query map"
            )
        raise ValueError(
            f"queries have head_dim {q} over {self.num_heads} head(s), keys {k} over {self.num_kv_heads}; pass query and key maps "
            "(out_features) of one head_dim"
        )

    def _head_dim(self, name: str, width: int | None, heads: int, given: bool) -> int | None:
        """The head_dim that the map `name` gives rows of a width; None where nobody says."""
        module = getattr(self, name)
        takes, gives = (
            (width, width) if module is None else (_size(module, "in_features"), _size(module, "out_features"))
        )
        if None not in (takes, width) and takes != width:
            raise ValueError(
                f"queries have width {width}, but query takes {takes}; pass queries of width {takes}"
                if given
                else f"embedding_fn gives rows of width {width}, but {name} takes {takes}; pass a {name} map with in_features={width}"
            )
        if gives is not None and gives % heads:
            raise ValueError(f"{name} gives rows of width {gives}; pass a multiple of its {heads} heads")
        return None if gives is None else gives // heads

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
        return _per_head(q, self._augmented("key", q), self.num_kv_heads, False)

    def unabsorb_values(self, out: Tensor) -> Tensor:
        """Weighted sums of (e, 1), out (Q, H, E + 1) -> W_v and b_v applied: (Q, H, Dv); of e alone without any bias."""
        return _per_head(out, self._augmented("value", out), self.num_kv_heads, True)

    def _augmented(self, name: str, of: Tensor) -> Tensor:
        """Weight and bias (Hk * D, E + 1), or the weight alone (Hk * D, E) where neither map has a bias; for something `of` its dtype."""
        linear = getattr(self, name)
        assert isinstance(linear, nn.Linear)
        _check_map("queries" if name == "key" else "attended rows", of, name, linear)
        if not self.has_bias:
            return linear.weight
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        return torch.cat([linear.weight, bias[:, None]], 1)


def _check_map(what: str, rows: Tensor, name: str, module: nn.Linear) -> None:
    """Raise ValueError where torch would refuse to multiply; autocast brings all but float64 to one dtype."""
    dtypes = rows.dtype, module.weight.dtype
    if dtypes[0] == dtypes[1] or (torch.is_autocast_enabled(rows.device.type) and torch.float64 not in dtypes):
        return
    instead = "" if torch.float64 in dtypes else ", or run under torch.autocast"
    raise ValueError(
        f"{what} are {dtypes[0]}, but the {name} map is {dtypes[1]}; cast one to the other's dtype{instead}"
    )


def _per_head(x: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # cast here, where backward casts back: it runs outside of autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _PerHead.apply(x, weight, groups, transposed)


class _PerHead(torch.autograd.Function):
    """x (Q, H, D) times its kv head's block of a weight (Hk * D, E), or of its transpose: (Q, H, E). One node where einsum leaves ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.transposed = groups, transposed
        blocks = weight.view(groups, -1, weight.shape[1])
        blocks, rows = blocks.mT if transposed else blocks, _to_groups(x, groups)
        if x.shape[1] != groups:
            return _from_groups(torch.bmm(rows, blocks), x.shape[1])
        out = x.new_empty(*x.shape[:2], blocks.shape[2])
        torch.bmm(
            rows, blocks, out=out.transpose(0, 1)
        )  # written where it belongs, so that nobody has to copy it there
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _PerHead.apply(grad, weight, ctx.groups, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            left, right = (grad, x) if ctx.transposed else (x, grad)
            dweight = torch.bmm(_to_groups(left, ctx.groups).mT, _to_groups(right, ctx.groups)).view_as(weight)
        return dx, dweight, None, None


def _to_groups(x: Tensor, groups: int) -> Tensor:
    """(Q, H, D) -> (Hk, Q * H / Hk, D)."""
    queries, heads, width = x.shape
    if heads == groups:
        return x.transpose(0, 1)
    return x.reshape(queries, groups, heads // groups, width).transpose(0, 1).reshape(groups, -1, width)


def _from_groups(x: Tensor, heads: int) -> Tensor:
    """The inverse: (Hk, Q * H / Hk, E) -> (Q, H, E)."""
    groups, _, width = x.shape
    if heads == groups:
        return x.transpose(0, 1)
    return x.view(groups, -1, heads // groups, width).transpose(0, 1).reshape(-1, heads, width)


def _size(module: nn.Module, name: str) -> int | None:
    size = getattr(module, name, None)
    return size if isinstance(size, int) else None


def with_one(rows: Tensor, spare: int = 0) -> Tensor:
    """Rows (n, E) as single-headed keys and values (n, 1, E + 1 + spare): the constant a bias needs, then zeros."""
    whole = F.pad(rows, (0, 1), value=1.0)
    return (F.pad(whole, (0, spare)) if spare else whole).unsqueeze(1)


def one_dtype(q: Tensor, k: Tensor, *v: Tensor) -> tuple[Tensor, ...]:
    """Queries, and values if given, in the keys' dtype: cast under autocast, ValueError elsewhere where they differ."""
    if all(x.dtype == k.dtype for x in (q, *v)):
        return q, *v
    if not torch.is_autocast_enabled(q.device.type):
        found = f"queries are {q.dtype}, keys {k.dtype}" + "".join(f", values {x.dtype}" for x in v)
        raise ValueError(f"{found}; cast them to one dtype, or run under torch.autocast")
    return tuple(x.to(k.dtype) for x in (q, *v))


def as_heads(rows: Tensor, num_heads: int, name: str) -> Tensor:
    """Rows (n, H * D) as (n, H, D)."""
    if rows.dim() != 2 or rows.shape[1] % num_heads:
        raise ValueError(
            f"{name} rows have shape {tuple(rows.shape)}; their width must be a multiple of the {num_heads} heads"
        )
    return rows.view(rows.shape[0], num_heads, rows.shape[1] // num_heads)
