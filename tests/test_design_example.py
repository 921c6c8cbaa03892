"""The worked example of docs/design.md, number by number, on two ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.routing import PermutedRows, Route, rfc_positions

TOKENS = [[[3, 5, 3, 3], [2, 5, 0, 0]], [[5, 1, 5, 0], [0, 0, 0, 0]]]
LENGTHS = [[4, 2], [3, 0]]


def walk() -> dict[str, Any]:
    group = SSPGroup(dist.group.WORLD)
    owners = PermutedRows(8, 2)
    space = UniqueSpace.from_padded(torch.tensor(TOKENS[group.rank]), torch.tensor(LENGTHS[group.rank]))
    occurrences = space.tokens[space.inverse]
    positions = rfc_positions(space.positions(), space.sample_of_occurrences(), group.rank, 2, 4)
    every = Route.build(owners.owner_of(occurrences), space.cu_occurrences, [2, 2], group)
    distinct = Route.build(owners.owner_of(space.tokens), space.cu_seqlens, [2, 2], group)
    owned = distinct.to_owners(space.tokens, "ids")
    received = UniqueSpace.from_packed(every.to_owners(occurrences, "ids"), every.received_cu_seqlens)
    return {
        "unique": space.tokens.tolist(),
        "counts": space.counts.tolist(),
        "cu_seqlens": space.cu_seqlens.tolist(),
        "rankwise tokens": occurrences[every.order].tolist(),
        "rankwise positions": positions[every.order].tolist(),
        "sizes": every.rankwise_sizes.tolist(),
        "distinct sizes": distinct.rankwise_sizes.tolist(),
        "distinct sent": space.tokens[distinct.order].tolist(),
        "owned": owned.tolist(),
        "bounds": distinct.received_cu_seqlens.tolist(),
        "weights": distinct.to_owners(space.counts.float().log(), "weights").tolist(),
        "looked up": UniqueSpace.from_packed(owned).tokens.tolist(),
        "owned by occurrences": received.tokens.tolist(),
        "weights by occurrences": received.counts.float().log().tolist(),
    }


def test_the_worked_example(rank_pools: Any) -> None:
    owners = PermutedRows(8, 2).owner_of(torch.arange(8)).tolist()
    assert [t for t in range(8) if owners[t] == 0] == [0, 2, 5, 7]
    first, second = rank_pools(2).run(walk)
    assert (first["unique"], first["counts"], first["cu_seqlens"]) == ([3, 5, 2, 5], [3, 1, 1, 1], [0, 2, 4])
    assert (second["unique"], second["counts"], second["cu_seqlens"]) == ([5, 1], [2, 1], [0, 2, 2])
    assert (first["rankwise tokens"], first["rankwise positions"]) == ([5, 2, 5, 3, 3, 3], [1, 4, 5, 0, 2, 3])
    assert (second["rankwise tokens"], second["rankwise positions"]) == ([5, 5, 1], [8, 10, 9])
    assert (first["sizes"], second["sizes"]) == ([[1, 2], [3, 0]], [[2, 0], [1, 0]])
    assert (first["distinct sent"], second["distinct sent"]) == ([5, 2, 5, 3], [5, 1])
    assert (first["distinct sizes"], second["distinct sizes"]) == ([[1, 2], [1, 0]], [[1, 0], [1, 0]])
    assert (first["owned"], first["bounds"]) == ([5, 2, 5, 5], [0, 1, 3, 4, 4])
    assert (second["owned"], second["bounds"]) == ([3, 1], [0, 1, 1, 2, 2])
    assert (first["looked up"], second["looked up"]) == ([5, 2], [3, 1])
    torch.testing.assert_close(first["weights"], [0.0, 0.0, 0.0, math.log(2)])
    torch.testing.assert_close(second["weights"], [math.log(3), 0.0])
    for rank in (first, second):
        assert rank["owned by occurrences"] == rank["owned"]
        assert rank["weights by occurrences"] == rank["weights"]
