"""Head projections, and their absorption into queries and output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ta_plugin.attention import weighted_attention
from ta_plugin.attention.projections import HeadProjections, with_one

EMBED, HEADS, DIM = 6, 4, 3


def projections(kv_heads: int, bias: bool = True) -> HeadProjections:
    torch.manual_seed(0)
    maps = [nn.Linear(EMBED, n * DIM, bias=bias, dtype=torch.float64) for n in (HEADS, kv_heads, kv_heads)]
    return HeadProjections(*maps, num_heads=HEADS, num_kv_heads=kv_heads)


def rows(n: int) -> Tensor:
    return torch.randn(n, EMBED, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_absorbed_attention_equals_projected_attention(kv_heads: int, bias: bool) -> None:
    p, table = projections(kv_heads, bias), rows(7).requires_grad_()
    q = p.queries(rows(5))
    bounds = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32)
    weight = torch.arange(7.0, dtype=torch.float64)
    k, v = p.keys_values(table)
    projected = weighted_attention(q, k, v, weight, *bounds)
    keys = with_one(table) if bias else table.unsqueeze(1)
    absorbed = weighted_attention(p.absorb_queries(q), keys, keys, weight, *bounds, scale=DIM**-0.5)
    results = [projected, p.unabsorb_values(absorbed)]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    sources = [table, *p.parameters()]
    grads = [torch.autograd.grad(x.square().sum(), sources, retain_graph=True) for x in results]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_only_linear_maps_are_absorbed() -> None:
    assert projections(2).absorbable
    normed = HeadProjections(None, nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), nn.Linear(6, 6))
    assert not normed.absorbable
    assert not normed.absorption_pays(10**6, 1, 10**6)
    assert not HeadProjections().absorbable  # the embedding itself: nothing to absorb


def test_absorption_pays_for_few_queries_only() -> None:
    p = projections(4)
    assert p.absorption_pays(num_rows=10_000, num_queries=1, pairs=100)
    assert not p.absorption_pays(num_rows=100, num_queries=10_000, pairs=1_000_000)


def test_without_maps_the_embedding_is_query_key_and_value() -> None:
    p, x = HeadProjections(num_heads=2), rows(3)
    assert torch.equal(p.queries(x).flatten(1), x)
    assert all(torch.equal(y.flatten(1), x) and y.shape == (3, 2, 3) for y in p.keys_values(x))


def test_head_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_kv_heads is 3, which does not divide num_heads, 4"):
        HeadProjections(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="must be a multiple of the 4 heads"):
        HeadProjections(num_heads=4).queries(rows(2))
