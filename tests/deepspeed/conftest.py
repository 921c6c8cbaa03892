from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import start_deepspeed
from ranks import RankPool


@pytest.fixture
def engines_on(rank_pools: Callable[[int], RankPool]) -> Callable[[int], Any]:
    """engines_on(n): a rank pool whose ranks have imported DeepSpeed already, so that no test's time limit pays for it."""

    def started(size: int) -> RankPool:
        pool = rank_pools(size)
        pool.run(start_deepspeed)
        return pool

    return started
