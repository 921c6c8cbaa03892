"""What would not be exact is refused when it is built, and the message says what to do instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layouts import Layout, config_of, megatron
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from ranks import RankPool

from ta_plugin.megatron import TokenizedModel, get_mixed_block_spec, tokenized_layer_spec
from ta_plugin.megatron.core_attention import TokenizedCoreAttention
from ta_plugin.megatron.refusals import check_layer, check_model, check_positions

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    "changes, named, remedy",
    [
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1", "attention_dropout=0.0"),
        ({"hidden_dropout": 0.2}, "hidden_dropout is 0.2", "hidden_dropout=0.0"),
        ({"window_size": (64, 0)}, "window_size", "window_size=None"),
        (
            {"num_moe_experts": 2, "moe_expert_capacity_factor": 1.0, "add_bias_linear": False},
            "capacity_factor is 1.0",
            "None",
        ),
        ({"num_moe_experts": 2, "moe_input_jitter_eps": 0.1, "add_bias_linear": False}, "jitter_eps is 0.1", "None"),
        ({"num_moe_experts": 2, "moe_z_loss_coeff": 0.1, "add_bias_linear": False}, "z_loss_coeff is 0.1", "None"),
        (
            {"num_moe_experts": 2, "moe_router_load_balancing_type": "seq_aux_loss", "add_bias_linear": False},
            "'seq_aux_loss'",
            "'aux_loss'",
        ),
    ],
)
def test_options(changes: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(ValueError) as refusal:
        check_layer(config_of(Layout(), **changes), AttnMaskType.no_mask, "self")
    assert named in str(refusal.value) and remedy in str(refusal.value)


@pytest.mark.parametrize("kind", ["learned_absolute", "rope", "mrope", "yarn"])
def test_positions(kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{kind}'.*'none'"):
        check_positions(kind)


def test_causal_and_cross_attention() -> None:
    build = {"config": config_of(Layout()), "layer_number": 1, "attention_type": "self"}
    with pytest.raises(ValueError, match=r"attn_mask_type is causal.*no_mask"):
        TokenizedCoreAttention(**build, attn_mask_type=AttnMaskType.causal)
    with pytest.raises(ValueError, match="attention_type is 'cross'"):
        TokenizedCoreAttention(**(build | {"attention_type": "cross"}), attn_mask_type=AttnMaskType.no_mask)


def test_pipelines() -> None:
    fixed = config_of(Layout(pp=2), variable_seq_lengths=False)
    with pytest.raises(ValueError, match=r"variable_seq_lengths=True.*row_capacity"):
        check_model(fixed, None, mixed=False)
    check_model(fixed, 64, mixed=False)
    for nothing in (0, []):
        with pytest.raises(ValueError, match="each 1 or more"):
            check_model(config_of(Layout()), nothing, mixed=False)
    with pytest.raises(ValueError, match=r"row_capacity is \[32, 64\].*one number"):
        check_model(fixed, [32, 64], mixed=False)
    with pytest.raises(ValueError, match="interleaved schedule on 2 pipeline stages"):
        check_model(config_of(Layout(pp=2, vpp=2)), None, mixed=False)
    with pytest.raises(ValueError, match=r"row_capacity is 64 in a mixed stack"):
        check_model(fixed, 64, mixed=True)


def test_mixed_stack_larger_than_the_stack() -> None:
    with pytest.raises(ValueError, match=r"num_tokenized_layers is 5; .*\[0, 4\]"):
        get_mixed_block_spec(config_of(Layout()), 5)


def repeats(deterministic: bool, mode: bool) -> list[bool]:
    with megatron(Layout()) as groups:
        config = config_of(Layout(), deterministic_mode=mode)
        model = TokenizedModel(config, 64, pg_collection=groups, vocab_divisible_by=8, deterministic=deterministic)
        asked: list[bool] = []

        def record(q: torch.Tensor, *_: Any, deterministic: bool, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(deterministic)
            return torch.zeros_like(q), torch.zeros(q.shape[:2])

        with patch("ta_plugin.attention.scoring.weighted_attention", record):
            model(torch.tensor([[1, 2, 1, 3]]), torch.tensor([4]))
        return asked


@pytest.mark.parametrize(
    "deterministic, mode, expected", [(True, False, True), (False, False, False), (False, True, True)]
)
def test_deterministic_reaches_the_kernel(
    megatron_ranks: Callable[[int], RankPool], deterministic: bool, mode: bool, expected: bool
) -> None:
    assert megatron_ranks(1).run(repeats, deterministic, mode)[0] == [expected] * Layout().sizes.layers


def refused(kind: str) -> str:
    with megatron(Layout(ssp=2)) as groups:
        config = config_of(Layout())
        tokens, lengths = torch.tensor([[1, 2, 1, 3]]), torch.tensor([4])
        try:
            if kind == "rotary":
                model = TokenizedModel(config, 60, pg_collection=groups, vocab_divisible_by=8)
                model(tokens, lengths, rotary_pos_emb=torch.zeros(4, 1, 1, 8))
            elif kind == "rotary base":
                spec = get_mixed_block_spec(config, 2, pp_rank=0)
                TokenizedModel(config, 60, spec, pg_collection=groups, vocab_divisible_by=8, rotary_base=1e4)
            elif kind == "no plan":
                gpt = GPTModel(config, tokenized_layer_spec, 64, 8, position_embedding_type="none")
                gpt(tokens, torch.arange(4)[None], None)
            elif kind == "rows":
                TokenizedModel(config, 60, pg_collection=groups, vocab_divisible_by=61)
            elif kind == "one bad id":
                model = TokenizedModel(config, 60, pg_collection=groups, vocab_divisible_by=8)
                model(tokens + (60 if groups.ssp.rank() else 0), lengths)
            elif kind in ("one bad label", "a list"):
                model = TokenizedModel(config, 60, pg_collection=groups, vocab_divisible_by=8)
                second = groups.ssp.rank() == 1
                given = tokens.tolist() if second and kind == "a list" else tokens
                model(given, lengths, labels=tokens + (60 if second and kind == "one bad label" else 0))
            elif kind == "capacity":
                model = TokenizedModel(config, 60, pg_collection=groups, vocab_divisible_by=8, row_capacity=2)
                model(tokens, lengths)
        except ValueError as refusal:
            return str(refusal)
    return "accepted"


@pytest.mark.parametrize(
    "kind, said",
    [
        ("rotary", "position_embedding_type='none'"),
        ("rotary base", "tokenized layers [1, 2] would be given positions; set config.no_rope_freq"),
        ("no plan", "use ta_plugin.megatron.TokenizedModel"),
        ("rows", "ssp size 2 does not divide"),
        ("one bad id", "rank 1 of 2: tokens"),
        ("one bad label", "rank 1 of 2: labels holds 63, but the output has 60 ids"),
        ("a list", "rank 1 of 2: tokens is a list; pass a tensor"),
        ("capacity", "3 distinct rows, but row_capacity is 2"),
    ],
)
def test_on_every_rank(megatron_ranks: Callable[[int], RankPool], kind: str, said: str) -> None:
    for message in megatron_ranks(2).run(refused, kind):
        assert said in message


_UNTOUCHED = """
import importlib, sys, torch
import megatron.core, megatron.core.models.gpt.gpt_layer_specs, megatron.core.optimizer, megatron.core.dist_checkpointing
import megatron.core.distributed, megatron.core.pipeline_parallel, megatron.core.transformer.moe.moe_layer
def picture():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("megatron", "torch"):
            for key, value in list(vars(module).items()):
                seen[name, key] = id(value)
                if isinstance(value, type):
                    seen.update({(name, key, k): id(v) for k, v in vars(value).items() if not k.startswith("__")})
    return seen
before = picture()
import ta_plugin, ta_plugin.megatron, ta_plugin.megatron.arguments, ta_plugin.megatron.checkpoint
after = picture()
changed = [key for key in before if after.get(key) != before[key]]
# class caches that torch and abc fill on first use, and submodules that were imported for the first time
changed = [key for key in changed if key[-1] not in ("_abc_impl",)]
assert not changed, changed[:20]
print("untouched")
"""


def test_importing_changes_no_attribute_of_megatron_or_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _UNTOUCHED], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("untouched"), done.stdout + done.stderr
