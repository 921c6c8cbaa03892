"""Under torch.autocast the class gives what it gives without, to the precision of bfloat16, forward and backward, in every strategy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, SSPGroup, TokenizedAttention

B, L, T, V, E = 3, 40, 2, 25, 16
MAPS: dict[str, tuple[str, ...]] = {
    "all": ("query", "key", "value"),
    "no query map": ("key", "value"),
    "a query map alone": ("query",),
    "a value map alone": ("value",),
    "none": (),
}


def results(model: TokenizedAttention, table: ShardedTokenEmbedding, given: dict[str, Tensor]) -> list[Tensor]:
    out = model(torch.arange(B * L).view(B, L) % V, torch.tensor([L, 0, 9]), **given)
    out.float().sin().sum().backward()
    dense = torch.zeros(V, E)
    for rows, grad in table.take_recorded():
        dense.index_add_(0, rows, grad.float())
    return [out.detach().float(), dense, *(p.grad.float() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "gather"},
        {"strategy": "owner"},
        {"strategy": "owner", "row_bound": B * L},
        {"strategy": "owner", "include_self": True},
        {"strategy": "owner", "normaliser": "none"},
        {"strategy": "positions"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("asked", ["targets", "queries", "queries in bfloat16", "nothing"])
def test_autocast(options: dict[str, Any], maps: str, asked: str) -> None:
    if asked == "nothing" and ({"row_bound", "include_self"} & options.keys() or options["strategy"] == "owner"):
        pytest.skip("of target attention")
    torch.manual_seed(0)
    table = ShardedTokenEmbedding(V, E)
    linear: dict[str, Any] = {name: nn.Linear(E, E) for name in MAPS[maps]}
    model = TokenizedAttention(B, L, 1, table, num_heads=2, **linear, **options)
    given: dict[str, Tensor] = {}
    if asked == "targets":
        given = {"targets": torch.arange(B * T).view(B, T)}
    elif asked != "nothing":
        given = {"queries": torch.randn(B, T, E)}
    expected = results(*copy.deepcopy((model, table)), given)
    if asked == "queries in bfloat16":
        given = {"queries": given["queries"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(model, table, given)
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours - exact).norm()) <= 0.03 * float(exact.norm()) + 5e-3  # a key bias has none


def on_ranks(maps: str, bounds: dict[str, int]) -> list[float]:
    """How far each result under autocast is from the one without, over the latter's size."""
    group = SSPGroup(dist.group.WORLD)
    torch.manual_seed(0)
    table = ShardedTokenEmbedding(V, E, group)
    linear: dict[str, Any] = {name: nn.Linear(E, E, bias=False) for name in MAPS[maps]}
    model = TokenizedAttention(B, L, group.size, table, group=group, num_heads=2, strategy="owner", **linear, **bounds)
    tokens = torch.arange(B * L).view(B, L) * (group.rank + 1) % V
    given = {"lengths": torch.tensor([L, 0, 9]), "targets": torch.arange(B * T).view(B, T)}
    found = []
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            out = model(tokens, **given)
        out.float().sin().sum().backward()
        rows = torch.zeros(table.rows.shape)
        for each, grad in table.take_recorded():
            rows.index_add_(0, each, grad.float())
        found.append([out.detach().float(), rows])
    return [float((ours - exact).norm() / exact.norm()) for exact, ours in zip(*found, strict=True)]


@pytest.mark.parametrize("bounds", [{}, {"row_bound": B * L}], ids=["", "bounded"])
@pytest.mark.parametrize("maps", ["all", "a query map alone"])
def test_owners_on_two_ranks(rank_pools: Any, maps: str, bounds: dict[str, int]) -> None:
    for far in rank_pools(2).run(on_ranks, maps, bounds):
        assert max(far) < 0.03, far
