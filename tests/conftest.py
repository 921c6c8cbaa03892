from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # oracle.py and ranks.py, here and in the ranks' processes

from ranks import RankPool

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """rank_pools(n): a pool of n gloo ranks, started on first use and shared by the session."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield pool
    for each in pools.values():
        each.close()
