"""Work beside the rest, in line and on branches of a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from ta_plugin.beside import Beside


def test_in_line_where_nothing_is_captured() -> None:
    beside, done = Beside(torch.device("cpu")), []
    with beside.work("first"):
        done.append(1)
    done.append(2)
    beside.join()
    assert done == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.xfail(strict=True))])
def test_what_a_branch_reads_is_not_used_again_before_it_joins(kept: bool) -> None:
    """Not kept, its memory goes to the next tensor of the same size, which is written while the branch still sleeps."""
    start = torch.arange(1 << 16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        beside = Beside(start.device)
        read = start + 1
        with beside.work("sum", *([read] if kept else [])):
            torch.cuda._sleep(20_000_000)
            total = read.sum()
        del read
        other = torch.zeros_like(start)
        beside.join()
    graph.replay()
    assert int(total) == int(start.sum()) + start.numel() and not other.any()
