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


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_absorption_equals_its_einsum_to_the_second_derivative(kv_heads: int, queries: int) -> None:
    p, x = projections(kv_heads, bias=False), torch.randn(queries, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    blocks = p.key.weight.view(kv_heads, DIM, EMBED)  # type: ignore[union-attr, operator]
    grouped = x.view(queries, kv_heads, HEADS // kv_heads, DIM)
    written_out = torch.einsum("qghd,gde->qghe", grouped, blocks).flatten(1, 2)
    torch.testing.assert_close(p.absorb_queries(x), written_out, rtol=0, atol=1e-12)
    if queries:
        leaf = p.key.weight.detach().clone().requires_grad_()  # type: ignore[union-attr, operator]
        assert torch.autograd.gradcheck(lambda x, w: projected_by(p, x, w), (x, leaf))
        assert torch.autograd.gradgradcheck(lambda x, w: projected_by(p, x, w), (x, leaf))


def projected_by(p: HeadProjections, x: Tensor, weight: Tensor) -> Tensor:
    changed = nn.Linear(EMBED, weight.shape[0], bias=False, dtype=weight.dtype)
    del changed.weight
    changed.weight = weight  # type: ignore[assignment]
    whole = HeadProjections(None, changed, changed, num_heads=p.num_heads, num_kv_heads=p.num_kv_heads)
    return whole.unabsorb_values(whole.absorb_queries(x))


def test_absorption_under_autocast_leaves_gradients_of_the_leaves_dtype() -> None:
    p, x = projections(2, bias=False).float(), torch.randn(5, HEADS, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = p.unabsorb_values(p.absorb_queries(x))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert {x.grad.dtype, p.key.weight.grad.dtype} == {torch.float32}  # type: ignore[union-attr]


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


def test_rows_of_another_dtype_are_named() -> None:
    p = projections(2)
    q, out = torch.zeros(5, HEADS, DIM), torch.zeros(5, HEADS, EMBED + 1)
    with pytest.raises(ValueError, match=r"queries are torch\.float32, but the key map is torch\.float64; cast one"):
        p.absorb_queries(q)
    with pytest.raises(
        ValueError, match=r"attended rows are torch\.float32, but the value map is torch\.float64; cast one"
    ):
        p.unabsorb_values(out)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"queries are torch\.float32, but the query map is"):
        p.queries(torch.zeros(5, EMBED))  # which torch does not cast either
