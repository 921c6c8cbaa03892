"""The fixed-size header: integers of every rank to every rank, and one rank's error to all of them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from ta_plugin import SSPGroup
from ta_plugin.parallel import exchange_header

LIMIT_S = 10


def exchange(fields: dict[int, list[int]], errors: dict[int, str]) -> tuple[str, Any, int]:
    group = SSPGroup(dist.group.WORLD)
    error = errors.get(group.rank)
    start = time.monotonic()
    try:
        result: Any = ("headers", exchange_header(group, fields[group.rank], OSError(error) if error else None))
    except ValueError as failure:
        result = ("error", str(failure))
    assert time.monotonic() - start < LIMIT_S
    return (*result, group.traffic.bytes["header"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_reads_every_ranks_fields(rank_pools: Any, ranks: int) -> None:
    fields = {r: [r, -r, 2**62 + r, 0] for r in range(ranks)}
    for kind, headers, _ in rank_pools(ranks).run(exchange, fields, {}):
        assert kind == "headers"
        assert headers == list(fields.values())


def test_all_fifteen_fields_travel(rank_pools: Any) -> None:
    fields = {r: [100 * r + i for i in range(15)] for r in range(2)}
    for _, headers, _ in rank_pools(2).run(exchange, fields, {}):
        assert headers == list(fields.values())


@pytest.mark.parametrize("text", ["tokens[1, 2] is -4", "Länge ungültig", "x" * 2000], ids=["short", "utf-8", "long"])
def test_one_ranks_error_raises_the_same_on_every_rank(rank_pools: Any, text: str) -> None:
    outcomes = rank_pools(4).run(exchange, {r: [r] for r in range(4)}, {2: text, 3: "a later one"})
    assert len({message for _, message, _ in outcomes}) == 1
    kind, message, _ = outcomes[0]
    assert kind == "error"
    assert message.startswith("rank 2 of 4: " + text[:400])
    outcomes = rank_pools(4).run(exchange, {r: [r] for r in range(4)}, {})  # the group is in step
    assert all(headers == [[0], [1], [2], [3]] for _, headers, _ in outcomes)


def test_its_size_does_not_depend_on_what_it_carries(rank_pools: Any) -> None:
    plain = rank_pools(2).run(exchange, {0: [1], 1: [1]}, {})
    failed = rank_pools(2).run(exchange, {0: [1], 1: [1]}, {0: "bad" * 50})
    assert {sent for _, _, sent in plain} == {sent for _, _, sent in failed}


def test_alone_an_error_is_raised_as_it_is() -> None:
    group = SSPGroup(None)
    assert exchange_header(group, [5, 6]) == [[5, 6]]
    with pytest.raises(ValueError, match=r"^lengths are odd$"):
        exchange_header(group, [5], ValueError("lengths are odd"))


def test_an_error_without_words_still_raises(rank_pools: Any) -> None:
    for kind, _, _ in rank_pools(2).run(exchange_wordless):
        assert kind == "error"


def exchange_wordless() -> tuple[str, Any, int]:
    group = SSPGroup(dist.group.WORLD)
    try:
        exchange_header(group, [1], AssertionError() if group.rank == 1 else None)
    except ValueError as failure:
        return "error", str(failure), 0
    return "headers", None, 0
