"""Training on distinct rows in every layout of ranks equals one dense process: losses and gradient norms over 10 steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from dense_model import DenseModel, Sizes
from layouts import Layout, train
from ranks import RankPool

STEPS = 10
MOE = Sizes(experts=4, aux_coeff=0.1)
PACKED = 36  # samples x length: no microbatch has more rows

LAYOUTS = {
    "ssp2": (2, Layout(ssp=2)),
    "ssp4": (4, Layout(ssp=4)),
    "tp2-ssp2": (4, Layout(ssp=2, tp=2)),
    "tp2-sp-ssp2": (4, Layout(ssp=2, tp=2, sequence_parallel=True)),
    "pp2-ssp2": (4, Layout(ssp=2, pp=2)),
    "pp2-interleaved": (4, Layout(ssp=2, pp=2, vpp=2, row_capacity=PACKED)),
    "ssp2-replicas2": (4, Layout(ssp=2)),
    "cp2-ssp2": (4, Layout(ssp=2, cp=2)),
    "cp2-ssp4": (4, Layout(ssp=4, cp=2)),
    "cp4-ssp2": (4, Layout(ssp=2, cp=4)),
    "cp2-pp2": (4, Layout(ssp=2, cp=2, pp=2)),
    "cp2-tp2-sp": (4, Layout(ssp=2, cp=2, tp=2, sequence_parallel=True)),
    "full-recompute": (4, Layout(ssp=2, recompute="full")),
    "selective-recompute": (4, Layout(ssp=2, recompute="selective")),
    "pp2-full-recompute": (4, Layout(ssp=2, pp=2, recompute="full")),
    "pp2-selective-recompute": (4, Layout(ssp=2, pp=2, recompute="selective")),
    "distributed-optimizer": (4, Layout(ssp=2, distributed_optimizer=True)),
    "distributed-optimizer-overlap": (4, Layout(ssp=4, distributed_optimizer=True, overlap=True)),
    "tp2-sp-distributed-recompute": (
        4,
        Layout(ssp=2, tp=2, sequence_parallel=True, distributed_optimizer=True, recompute="full"),
    ),
    "pp2-interleaved-overlap": (
        4,
        Layout(ssp=2, pp=2, vpp=2, row_capacity=PACKED, distributed_optimizer=True, overlap=True, recompute="full"),
    ),
    "per-token-loss": (2, Layout(ssp=2, sizes=Sizes(per_token=True))),
    "per-token-loss-cp2": (2, Layout(ssp=2, cp=2, sizes=Sizes(per_token=True))),
    "row-multiple": (2, Layout(ssp=2, row_multiple=8)),
    "row-buckets-pp2": (4, Layout(ssp=2, pp=2, row_capacity=(12, 24, PACKED))),
    "moe": (2, Layout(ssp=2, sizes=MOE)),
    "moe-ep2": (2, Layout(ssp=2, ep=2, sizes=MOE)),
    "moe-ep2-replicas2": (4, Layout(ssp=2, ep=2, sizes=MOE)),
    "moe-ep2-cp2": (2, Layout(ssp=2, ep=2, cp=2, sizes=MOE)),
    "moe-tp2-sp": (2, Layout(tp=2, sequence_parallel=True, sizes=MOE)),
    "mixed": (2, Layout(ssp=2, tokenized_layers=2)),
    "mixed-causal-tp2-sp": (4, Layout(ssp=2, tokenized_layers=1, causal_top=True, tp=2, sequence_parallel=True)),
    "mixed-causal-pp2": (4, Layout(ssp=2, tokenized_layers=1, causal_top=True, pp=2)),
    "mixed-causal-recompute": (2, Layout(ssp=2, tokenized_layers=3, causal_top=True, recompute="full")),
}


# what the newest Megatron-core runs (tests/newest.sh): each kind of parallelism once
NEWEST = {
    "ssp4",
    "tp2-sp-ssp2",
    "pp2-ssp2",
    "pp2-interleaved-overlap",
    "ssp2-replicas2",
    "cp2-ssp2",
    "selective-recompute",
    "moe-ep2-replicas2",
    "mixed-causal-pp2",
}


@cache
def dense(sizes: Sizes, causal_from: int | None) -> tuple[list[float], list[float]]:
    return DenseModel(sizes, causal_from).train(STEPS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.newest] if name in NEWEST else []) for name in LAYOUTS]
)
def test_equals_one_dense_process(megatron_ranks: Callable[[int], RankPool], name: str) -> None:
    ranks, layout = LAYOUTS[name]
    losses, norms = dense(layout.sizes, layout.tokenized_layers if layout.causal_top else None)
    outcomes = megatron_ranks(ranks).run(train, layout, STEPS)
    reported = [mine for mine, _ in outcomes if mine is not None]
    assert reported
    for mine in reported:
        assert mine == pytest.approx(losses, abs=1e-5)
    for _, mine in outcomes:  # every rank clips by the same norm
        assert mine == pytest.approx(norms, rel=1e-5)
    assert losses[0] - min(losses) > 0.5  # the curve that is compared moves
