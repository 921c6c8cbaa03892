"""Owners of ids and their rows in a shard, compiled and in torch, against whole numbers of Python."""

from __future__ import annotations

import pytest
import torch

from ta_plugin.ops.planning import LOCAL_ROWS, OWNERS
from ta_plugin.routing import PermutedRows

IDS = [0, 1, 5, 16, 39, 40, 41, 3_999_999, -1, -2, 2**31 + 7, 2**62, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("form", ["compiled", "plain"])
@pytest.mark.parametrize(("vocab", "ranks"), [(1, 1), (40, 1), (41, 3), (2, 4), (4_000_000, 2), (3_037_000_499, 7)])
def test_owners_and_rows_within_every_shard(device: str, form: str, vocab: int, ranks: int) -> None:
    table = PermutedRows(vocab, ranks)
    ids = torch.tensor(IDS, device=device)
    owners, local_rows = (op if form == "compiled" else op.plain for op in (OWNERS, LOCAL_ROWS))
    places = [i * table.multiplier % vocab if 0 <= i < vocab else None for i in IDS]
    expected = [-1 if p is None else p // table.rows_per_rank for p in places]
    assert owners(ids, ranks, vocab, table.multiplier).tolist() == expected
    for rank in range(ranks):
        first, last = table.shard(rank)
        found = local_rows(ids, first, last - first, vocab, table.multiplier, 99)
        assert found.tolist() == [99 if p is None or not first <= p < last else p - first for p in places]
        assert torch.equal(found, table.local_row(ids, rank, other=99))
