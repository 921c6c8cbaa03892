"""A run saved in one layout resumes in another, optimizer state included, and its next steps are those of the dense run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dense_model import DenseModel, Sizes
from layouts import Layout, resume, train_and_save
from ranks import RankPool

PAIRS = {
    "ssp2-to-ssp1": (2, Layout(ssp=2), Layout(ssp=1)),
    "ssp1-to-ssp2": (2, Layout(ssp=1), Layout(ssp=2)),
    "ssp2-to-tp2": (2, Layout(ssp=2), Layout(tp=2)),
    "tp2-sp-to-ssp2": (2, Layout(tp=2, sequence_parallel=True), Layout(ssp=2)),
    "ssp2-to-pp2": (2, Layout(ssp=2), Layout(pp=2)),
    "ssp2-to-ssp4": (4, Layout(ssp=2), Layout(ssp=4)),
    "pp2-ssp2-to-tp2-ssp2": (4, Layout(ssp=2, pp=2), Layout(ssp=2, tp=2)),
    "tp2-ssp2-to-pp2-ssp2": (4, Layout(ssp=2, tp=2), Layout(ssp=2, pp=2)),
}
NEWEST = {("ssp2-to-ssp4", False), ("pp2-ssp2-to-tp2-ssp2", True)}  # see test_megatron_layouts.py
CASES = [
    pytest.param(name, distributed, marks=[pytest.mark.newest] if (name, distributed) in NEWEST else [])
    for name in PAIRS
    for distributed in (False, True)
]


@pytest.mark.parametrize(("name", "distributed_optimizer"), CASES)
def test_resumes_in_another_layout(
    megatron_ranks: Callable[[int], RankPool], tmp_path: Path, name: str, distributed_optimizer: bool
) -> None:
    ranks, saved, resumed = PAIRS[name]
    saved, resumed = (replace(x, distributed_optimizer=distributed_optimizer) for x in (saved, resumed))
    losses, norms = DenseModel(Sizes()).train(6)
    pool = megatron_ranks(ranks)
    before = [mine for mine in pool.run(train_and_save, saved, 3, str(tmp_path / "run")) if mine is not None]
    assert all(mine == pytest.approx(losses[:3], abs=1e-5) for mine in before)
    for mine, mine_norms in pool.run(resume, resumed, 3, str(tmp_path / "run")):
        assert mine is None or mine == pytest.approx(losses[3:], abs=1e-5)
        assert mine_norms == pytest.approx(norms[3:], rel=1e-5)
