"""Under torch.autocast the class gives what it gives without, to the precision of bfloat16, forward and backward, in every strategy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention

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
