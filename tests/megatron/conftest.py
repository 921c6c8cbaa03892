from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file, here and in the ranks' processes
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under sequence parallelism

import warm
from ranks import RankPool

if find_spec("megatron") is None or find_spec("megatron.core") is None:
    collect_ignore_glob = ["test_*.py"]  # nothing here runs without Megatron-core


@pytest.fixture(scope="session")
def megatron_ranks(rank_pools: Callable[[int], RankPool]) -> Iterator[Callable[[int], RankPool]]:
    """megatron_ranks(n): a pool whose ranks have imported Megatron-core, one piece after another."""

    def pool(size: int) -> RankPool:
        ranks = rank_pools(size)
        for module in warm.MODULES:
            ranks.run(warm.load, module)
        return ranks

    yield pool
