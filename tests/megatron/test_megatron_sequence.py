"""Layout "sequence" in the place of context parallelism: chunks of any length train as whole samples on one dense process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dense_model import DenseModel, Sizes, microbatch
from layouts import Layout, build, megatron, train
from ranks import RankPool

STEPS = 3
MOE = Sizes(experts=4, aux_coeff=0.1)

LAYOUTS = {
    "cp2-ssp2": (2, Layout(ssp=2, cp=2, chunks=(7, 5))),
    "cp4-ssp4": (4, Layout(ssp=4, cp=4, chunks=(5, 0, 1, 6))),
    "cp2-ssp4-dp2": (4, Layout(ssp=4, cp=2, chunks=(2, 10))),
    "cp4-ssp2": (4, Layout(ssp=2, cp=4, chunks=(3, 3, 3, 3))),
    "cp2-tp2-sp": (4, Layout(ssp=2, cp=2, tp=2, sequence_parallel=True, chunks=(7, 5))),
    "cp2-pp2-recompute": (4, Layout(ssp=2, cp=2, pp=2, recompute="full", chunks=(7, 5))),
    "cp2-distributed-selective": (
        4,
        Layout(ssp=2, cp=2, distributed_optimizer=True, recompute="selective", row_capacity=72, chunks=(12, 0)),
    ),
    "cp2-moe-ep2": (2, Layout(ssp=2, ep=2, cp=2, sizes=MOE, chunks=(7, 5))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_dense_process(megatron_ranks: Callable[[int], RankPool], name: str) -> None:
    ranks, layout = LAYOUTS[name]
    losses, norms = DenseModel(layout.sizes, None).train(STEPS)
    outcomes = megatron_ranks(ranks).run(train, layout, STEPS)
    reported = [mine for mine, _ in outcomes if mine is not None]
    assert reported
    for mine in reported:
        assert mine == pytest.approx(losses, abs=1e-5)
    for _, mine in outcomes:
        assert mine == pytest.approx(norms, rel=1e-5)


def evaluate(chunks: tuple[int, ...] | None) -> tuple[torch.Tensor, dict[str, int]]:
    """Logits of every third position of this rank's chunk, and what was sent over context parallelism."""
    cp = dist.get_world_size() if chunks else 1
    with megatron(Layout(cp=cp, ssp=cp, chunks=chunks)) as groups:
        run = build(Layout(cp=cp, ssp=cp, chunks=chunks), groups)
        tokens, lengths, labels = microbatch(Sizes(), 0, 0)
        select = (torch.arange(tokens.shape[1]) % 3 == 0) & (torch.arange(tokens.shape[1]) < lengths[:, None])
        if chunks:
            labels[:] = select
            tokens, lengths, labels = run._chunk(tokens, lengths, labels)
            select = labels.bool()
        with torch.no_grad():
            logits = run.chunks[0](tokens, lengths, select=select)
        sample = select.nonzero()[:, 0]
        return torch.cat([sample[:, None], logits], 1), dict(run.chunks[0].context.traffic.elements)


def test_selected_logits_come_back_to_the_readers(megatron_ranks: Callable[[int], RankPool]) -> None:
    whole, _ = megatron_ranks(2).run(evaluate, None)[0]
    parts = megatron_ranks(2).run(evaluate, (7, 5))
    joined = torch.cat([part for part, _ in parts])
    by_sample = joined[joined[:, 0].argsort(stable=True)]  # chunks are in order, so positions of a sample are too
    torch.testing.assert_close(by_sample, whole, rtol=0, atol=1e-5)
    sizes, tokens, lengths = Sizes(), *microbatch(Sizes(), 0, 0)[:2]
    rows = sum(len(set(x[:n].tolist())) for x, n in zip(tokens, lengths.tolist(), strict=True))
    width = 2 * sizes.groups * (sizes.hidden // sizes.heads)
    sent = sum(t[name] for _, t in parts for name in ("ring.keys", "ring.values"))
    assert sent == sizes.layers * rows * width  # one hop of each distinct row per layer


def refusals() -> list[str]:
    messages = []
    layout = Layout(cp=2, ssp=2, chunks=(7, 5))
    with megatron(layout) as groups:
        for change in ("samples", "labels", "capacity"):
            run = build(layout, groups)
            model: Any = run.chunks[0]
            tokens, lengths, labels = run._chunk(*microbatch(Sizes(), 0, 0))
            if change == "samples" and groups.cp.rank() == 1:
                tokens, lengths, labels = tokens[:2], lengths[:2], labels[:2]
            if change == "labels" and groups.cp.rank() == 1:
                labels = labels.int()
            if change == "capacity":
                model.row_capacity = 4
            try:
                model(tokens, lengths, labels)
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_what_is_wrong_with_one_chunk_raises_on_every_rank(megatron_ranks: Callable[[int], RankPool]) -> None:
    first, second = megatron_ranks(2).run(refusals)
    assert first == second
    samples, labels, capacity = first
    assert "tokens hold [3, 2] samples on the context-parallel ranks" in samples
    assert "labels is torch.int32" in labels
    assert "the busiest of 2 context-parallel ranks owns" in capacity and "row_capacity is 4" in capacity
