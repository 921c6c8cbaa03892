"""Rows of ids in their owners' shards, compiled and in torch, against whole numbers of Python."""

from __future__ import annotations

import pytest
import torch

from ta_plugin.ops.planning import LOCAL_ROWS
from ta_plugin.routing import PermutedRows

IDS = [0, 1, 5, 16, 39, 40, -1, -2, 2**31 + 7, 2**62, -(2**63)]


@pytest.mark.parametrize("form", ["compiled", "plain"])
@pytest.mark.parametrize(("vocab", "ranks"), [(1, 1), (40, 1), (41, 3), (4_000_000, 2), (3_037_000_499, 7)])
def test_rows_within_a_shard(device: str, form: str, vocab: int, ranks: int) -> None:
    owners = PermutedRows(vocab, ranks)
    ids = torch.tensor(IDS, device=device)
    local_rows = LOCAL_ROWS if form == "compiled" else LOCAL_ROWS.plain
    found = local_rows(ids, ranks, vocab, owners.multiplier)
    assert torch.equal(found, owners.local_row(ids))
    wrapped = [(i * owners.multiplier + 2**63) % 2**64 - 2**63 for i in IDS]  # as int64 multiplies
    assert found.tolist() == [p % vocab % owners.rows_per_rank for p in wrapped]
    mine = torch.arange(min(vocab, 1000), device=device)
    whole = owners.owner_of(mine) * owners.rows_per_rank + owners.local_row(mine)
    assert torch.equal(whole, owners.permute(mine))
