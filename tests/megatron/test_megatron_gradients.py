"""Our own reduction, and torch's AdamW: what trains where Megatron's DDP and optimizer cannot, without imitating CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from dense_model import DenseModel, Sizes, microbatch
from layouts import Layout, config_of, fill
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from ranks import RankPool, own_groups

from ta_plugin.megatron import TokenizedModel, create_ssp_groups, get_mixed_block_spec, loss_function
from ta_plugin.megatron.gradients import clip_gradients, reduce_gradients

SIZES = Sizes(microbatches=2)


def train_plainly(layout: Layout, steps: int) -> list[tuple[float, float]]:
    with own_groups():
        return _train_plainly(layout, steps)


def _train_plainly(layout: Layout, steps: int) -> list[tuple[float, float]]:
    parallel_state.initialize_model_parallel(
        layout.tp, context_parallel_size=layout.cp, create_gloo_process_groups=False
    )
    try:
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=True)
        groups = create_ssp_groups(layout.ssp).attach()
        config, spec = config_of(layout), None
        if layout.tokenized_layers is not None:
            spec = get_mixed_block_spec(
                config, layout.tokenized_layers, causal=layout.causal_top, use_sdpa=True, pp_rank=0
            )
        model = TokenizedModel(config, SIZES.vocab, spec, pg_collection=groups, vocab_divisible_by=8)
        fill(model, layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=SIZES.lr, weight_decay=0.0)
        outcomes = []
        for step in range(steps):
            optimizer.zero_grad()
            reported = torch.zeros(())
            mine = range(groups.dp.rank(), SIZES.microbatches, groups.dp.size())
            for index in mine:
                tokens, lengths, labels = microbatch(SIZES, step, index)
                reduce = loss_function(labels, lengths, context_parallel_size=layout.cp)
                total, count, _ = reduce(model(tokens, lengths, labels))
                loss = total / count.clamp(min=1) / len(mine)
                loss.backward()
                reported += loss.detach()
            dist.all_reduce(reported, group=groups.dp_cp)
            reduce_gradients(model.parameters(), groups)
            norm = clip_gradients(model.parameters(), groups, SIZES.clip)
            optimizer.step()
            outcomes.append((reported.item() / groups.dp_cp.size(), norm))
        return outcomes
    finally:
        parallel_state.destroy_model_parallel()


LAYOUTS = {
    "ssp2": Layout(ssp=2),
    "tp2": Layout(tp=2),
    "cp2-ssp2": Layout(ssp=2, cp=2),
    "dp2": Layout(ssp=1),
    "mixed": Layout(ssp=2, tokenized_layers=2),
    "mixed-causal-tp2": Layout(tp=2, tokenized_layers=1, causal_top=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_dense_process(megatron_ranks: Callable[[int], RankPool], name: str) -> None:
    layout = LAYOUTS[name]
    losses, norms = DenseModel(SIZES, layout.tokenized_layers if layout.causal_top else None).train(5)
    for outcomes in megatron_ranks(2).run(train_plainly, layout, 5):
        assert [loss for loss, _ in outcomes] == pytest.approx(losses, abs=1e-5)
        assert [norm for _, norm in outcomes] == pytest.approx(norms, rel=1e-5)
