"""bfloat16 training with Megatron's mixed precision follows the dense float64 process, in each kind of parallelism, and resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dense_model import DenseModel, Sizes
from layouts import Layout, resume, train, train_and_save
from ranks import ON_GPUS, RankPool

STEPS, FAR = 6, 0.03  # bfloat16 keeps 8 bits of a weight: losses near 4 differ by some hundredths (0.021 on two H100s)
SIZES = Sizes(hidden=128, heads=2, groups=1)  # head_dim 64, which kernels take
LAYOUTS = {
    "one": (1, Layout(distributed_optimizer=True)),
    "tp2-sp": (2, Layout(tp=2, sequence_parallel=True, distributed_optimizer=True)),
    "pp2": (2, Layout(pp=2)),
    "ssp2-distributed-overlap": (2, Layout(ssp=2, distributed_optimizer=True, overlap=True)),
    "sequence-cp2": (2, Layout(ssp=2, cp=2, distributed_optimizer=True, recompute="selective", chunks=(7, 5))),
    "tp2-sp-ssp2": (4, Layout(ssp=2, tp=2, sequence_parallel=True, distributed_optimizer=True)),
    "pp2-ssp2": (4, Layout(ssp=2, pp=2, distributed_optimizer=True)),
    "sequence-cp2-tp2-sp": (4, Layout(ssp=2, cp=2, tp=2, sequence_parallel=True, chunks=(7, 5))),
}
ON_CPU = {"ssp2-distributed-overlap", "sequence-cp2"}  # what the kinds of parallelism do is compared in float32 there


@pytest.mark.parametrize("name", [name for name in LAYOUTS if ON_GPUS or name in ON_CPU])
def test_follows_the_dense_process(megatron_ranks: Callable[[int], RankPool], name: str) -> None:
    ranks, layout = LAYOUTS[name]
    losses, norms = DenseModel(SIZES).train(STEPS)
    for mine, mine_norms in megatron_ranks(ranks).run(train, replace(layout, bf16=True, sizes=SIZES), STEPS):
        print(name, mine, losses, mine_norms, norms)
        assert mine is None or mine == pytest.approx(losses, abs=FAR)
        assert mine_norms == pytest.approx(norms, rel=0.05)
    assert losses[0] - min(losses) > 10 * FAR


def test_resumes_in_another_layout(megatron_ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    saved = Layout(ssp=2, distributed_optimizer=True, bf16=True, sizes=SIZES)
    losses, _ = DenseModel(SIZES).train(STEPS)
    pool = megatron_ranks(2)
    pool.run(train_and_save, saved, 3, str(tmp_path / "run"))
    for mine, _ in pool.run(resume, replace(saved, ssp=1, tp=2), STEPS - 3, str(tmp_path / "run")):
        assert mine == pytest.approx(losses[3:], abs=FAR)
