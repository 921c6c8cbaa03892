"""Every module of a tokenized layer runs on the distinct rows: as many as there are, and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense_model import DenseModel, Sizes, microbatch
from layouts import Layout, build, config_of, megatron
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from ranks import RankPool
from torch import Tensor

from ta_plugin.megatron import TokenizedSeqParams, plan_microbatch, tokenized_layer_spec
from ta_plugin.megatron.layers import rotary_angles
from ta_plugin.megatron.loss import LabelledRows
from ta_plugin.megatron.plan import RowLayout
from ta_plugin.unique_space import UniqueSpace

pytestmark = pytest.mark.newest


def rows_seen(layout: Layout) -> tuple[dict[str, set[int]], int, int]:
    """Row counts that reached each kind of module, the distinct rows U, and the occurrences."""
    with megatron(layout) as groups:
        run = build(layout, groups)
        model, seen = run.chunks[0], {}
        watched = {
            "input_layernorm",
            "linear_qkv",
            "core_attention",
            "linear_proj",
            "pre_mlp_layernorm",
            "linear_fc1",
            "linear_fc2",
        }
        watched |= {"final_layernorm"}
        for name, module in model.named_modules():
            kind = name.split(".")[-1]
            if kind in watched or isinstance(module, MLP):
                key = "mlp" if isinstance(module, MLP) else kind
                module.register_forward_hook(
                    lambda _m, args, _out, key=key: seen.setdefault(key, set()).add(args[0].shape[0])
                )
        tokens, lengths, labels = microbatch(layout.sizes, 0, groups.dp.rank())
        model(tokens, lengths, labels)
        space = UniqueSpace.from_padded(tokens, lengths)
        return seen, space.num_rows, space.num_occurrences


def test_norm_qkv_attention_and_mlp_run_on_distinct_rows(megatron_ranks: Callable[[int], RankPool]) -> None:
    for seen, rows, occurrences in megatron_ranks(2).run(rows_seen, Layout(ssp=2)):
        assert rows < occurrences
        assert len(seen) == 9
        assert all(counts == {rows} for counts in seen.values()), (seen, rows)


def test_sequence_and_context_parallel_ranks_share_the_rows(megatron_ranks: Callable[[int], RankPool]) -> None:
    for seen, rows, _ in megatron_ranks(2).run(rows_seen, Layout(tp=2, sequence_parallel=True)):
        assert seen["input_layernorm"] == {-(-rows // 2)} and seen["linear_qkv"] == {-(-rows // 2)}
        assert seen["core_attention"] == {-(-rows // 2) * 2}
    for seen, rows, _ in megatron_ranks(2).run(rows_seen, Layout(ssp=2, cp=2)):
        assert all(counts == {-(-rows // 2)} for counts in seen.values())


def through_gpt_model() -> tuple[Tensor, Tensor]:
    """A stock GPTModel of tokenized layers, given distinct tokens and a plan; against plain attention."""
    sizes = Sizes()
    with megatron(Layout()):
        config = config_of(Layout())
        model = GPTModel(config, tokenized_layer_spec, sizes.vocab, sizes.length, position_embedding_type="none")
        dense = DenseModel(sizes)
        names = {"embedding.word_embeddings.weight": "embedding.weight"}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(dense.p[names.get(name, name)])
        tokens, lengths, _ = microbatch(sizes, 0, 0)
        plan = plan_microbatch(tokens, lengths)
        space = plan.layout.space
        logits = model(space.tokens[None], torch.zeros(1, space.num_rows).long(), None, packed_seq_params=plan)
        expected = dense.hidden(tokens, lengths)[0] @ dense.p["output_layer.weight"].T
        inside = torch.arange(sizes.length) < lengths[:, None]
        return space.expand(logits[0])[inside].detach(), expected[inside].detach().float()


def test_spec_serves_a_stock_gpt_model(megatron_ranks: Callable[[int], RankPool]) -> None:
    mine, expected = megatron_ranks(1).run(through_gpt_model)[0]
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def selected_logits(layout: Layout) -> tuple[Tensor, Tensor]:
    with megatron(layout) as groups:
        run = build(layout, groups)
        tokens, lengths, _ = microbatch(layout.sizes, 0, 1)
        last = torch.arange(tokens.shape[1]) == lengths[:, None] - 1
        past = torch.arange(tokens.shape[1]) >= lengths[:, None]
        assert past.any()
        mine = run.chunks[0](tokens, lengths, select=last | past)
        dense = DenseModel(layout.sizes, layout.tokenized_layers if layout.causal_top else None)
        expected = (dense.hidden(tokens, lengths)[0] @ dense.p["output_layer.weight"].T)[last]
        return mine.detach(), expected.detach().float()


@pytest.mark.parametrize("layout", [Layout(ssp=2), Layout(ssp=2, tokenized_layers=2, causal_top=True)])
def test_logits_of_selected_occurrences(megatron_ranks: Callable[[int], RankPool], layout: Layout) -> None:
    for mine, expected in megatron_ranks(2).run(selected_logits, layout):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_equal_labels_of_equal_tokens_are_computed_once() -> None:
    tokens, lengths = torch.tensor([[5, 6, 5, 5], [6, 6, 9, 9]]), torch.tensor([4, 2])
    labels = torch.tensor([[1, 2, 1, 3], [2, -100, 7, 7]])
    layout = RowLayout.of(UniqueSpace.from_padded(tokens, lengths))
    pairs = LabelledRows.of(labels, layout, vocab_size=10)
    found = dict(zip(zip(pairs.rows.tolist(), pairs.labels.tolist(), strict=True), pairs.counts.tolist(), strict=True))
    assert found == {(0, 1): 2.0, (0, 3): 1.0, (1, 2): 1.0, (2, 2): 1.0}


@pytest.mark.parametrize("parts, multiple", [(1, 1), (2, 1), (2, 4), (4, 8)])
def test_parts_cover_all_rows_once(parts: int, multiple: int) -> None:
    space = UniqueSpace.from_padded(torch.arange(11)[None], torch.tensor([11]))
    layouts = [RowLayout.of(space, parts=parts, part=part, multiple=multiple) for part in range(parts)]
    assert torch.cat([layout.tokens() for layout in layouts]).tolist() == list(range(11))
    assert all(layout.local % multiple == 0 and layout.counts().shape == (layout.local,) for layout in layouts)
    assert sum(int(layout.query_bounds()[-1]) for layout in layouts) == 11
    assert isinstance(TokenizedSeqParams.of(layouts[0]).layout, RowLayout)


@pytest.mark.parametrize("distinct, local", [(1, 4), (8, 4), (9, 8), (16, 8), (17, 16)])
def test_the_smallest_bucket_that_holds_the_rows(distinct: int, local: int) -> None:
    space = UniqueSpace.from_padded(torch.arange(distinct)[None], torch.tensor([distinct]))
    layout = RowLayout.of(space, parts=2, multiple=4, capacity=(16, 32, 8))
    assert layout.local == local


def test_rows_that_fit_no_bucket_are_refused() -> None:
    space = UniqueSpace.from_padded(torch.arange(33)[None], torch.tensor([33]))
    with pytest.raises(ValueError, match=r"33 distinct rows, but row_capacity is \(16, 32\)"):
        RowLayout.of(space, capacity=(16, 32))
    with pytest.raises(ValueError, match="12 is no multiple of 8"):
        RowLayout.of(space, parts=2, multiple=4, capacity=(12, 64))


def both_angles() -> tuple[Tensor, Tensor]:
    with megatron(Layout()):
        theirs = RotaryEmbedding(8, 1.0, rotary_base=500, use_cpu_initialization=True)
        return rotary_angles(12, 8, 500, torch.device("cpu")), theirs(12)


def test_rotary_angles_are_those_of_megatron(megatron_ranks: Callable[[int], RankPool]) -> None:
    mine, theirs = megatron_ranks(1).run(both_angles)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
