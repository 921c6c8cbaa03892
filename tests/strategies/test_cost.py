"""The cost model: which strategy it takes, what it prints, and its estimate of imbalance against measured loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ta_plugin import TokenizedAttention, UniqueSpace
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import Rates, Workload, choose_strategy, estimate, explain, id_shares
from ta_plugin.strategies.cost import imbalance

NETWORK_BOUND = Rates(bytes_per_second=1e9, flops_per_second=1e15)
COMPUTE_BOUND = Rates(bytes_per_second=1e15, flops_per_second=1e9)


def workload(rows: float = 1000, queries: float = 1, ranks: int = 8, samples: int = 16, **changes: Any) -> Workload:
    """Per rank: `rows` distinct tokens and `queries` targets per sample; every token twice in its sample."""
    load = Workload(
        ranks=ranks, samples=samples, occurrences=2 * rows * samples, rows=rows * samples, ids=0.8 * rows * samples,
        queries=queries * samples, pairs=queries * rows * samples, position_pairs=2 * queries * rows * samples,
        targets=True, embed_dim=64, heads=4, kv_heads=4, head_dim=16,
    )  # fmt: skip
    return replace(load, **changes)


def choice(load: Workload, requested: str = "auto", only_gather: str | None = None) -> str:
    return choose_strategy(load, NETWORK_BOUND, requested, only_gather)[0]


def test_few_targets_onto_long_histories_stay_with_the_owners() -> None:
    assert choice(workload(rows=10_000, queries=1)) == "owner"


def test_many_targets_fetch_the_history() -> None:
    assert choice(workload(rows=10_000, queries=5000)) == "gather"


def test_the_choice_flips_once_as_targets_grow() -> None:
    chosen = [choice(workload(rows=1000, queries=t)) for t in (1, 10, 100, 1000, 10_000)]
    assert chosen[0] == "owner"
    assert chosen[-1] == "gather"
    assert chosen == sorted(chosen, reverse=True)


def test_the_choice_flips_once_as_distinct_tokens_grow() -> None:
    chosen = [choice(workload(rows=u, queries=50)) for u in (1, 10, 100, 1000, 10_000, 100_000)]
    assert chosen[0] == "gather"
    assert chosen[-1] == "owner"
    assert chosen == sorted(chosen)


def test_one_rank_and_self_attention_gather() -> None:
    assert choose_strategy(workload(ranks=1), NETWORK_BOUND, "auto", None) == ("gather", "one rank owns every token")
    assert choose_strategy(workload(), NETWORK_BOUND, "auto", "no targets") == ("gather", "no targets")
    with pytest.raises(ValueError, match="strategy is 'owner', but no targets"):
        choice(workload(), "owner", "no targets")
    for requested in ("gather", "owner", "positions"):
        assert choice(workload(), requested) == requested


def test_owner_sends_as_much_whatever_the_history_but_for_ids_and_weights() -> None:
    short, long = (estimate("owner", workload(rows=u), NETWORK_BOUND).bytes_sent for u in (1000, 3000))
    assert long - short == pytest.approx(7 / 8 * 16 * 2000 * 12)  # an int64 id and a float32 weight each


def test_gather_scales_with_distinct_ids_and_positions_with_occurrences() -> None:
    load = workload(queries=0, targets=False)
    gather, positions = (estimate(name, load, NETWORK_BOUND) for name in ("gather", "positions"))
    assert positions.bytes_sent / gather.bytes_sent == pytest.approx(load.occurrences / load.ids)
    assert positions.flops > gather.flops
    assert positions.memory > gather.memory


def test_time_is_bytes_and_operations_at_their_rates() -> None:
    load = workload()
    for rates in (NETWORK_BOUND, COMPUTE_BOUND):
        e = estimate("owner", load, rates)
        assert e.seconds == pytest.approx(e.bytes_sent / rates.bytes_per_second + e.flops / rates.flops_per_second)
    assert Rates.of(torch.device("cpu")).bytes_per_second < Rates.of(torch.device("cuda")).bytes_per_second


def test_an_explanation_prints_its_figures() -> None:
    load = workload(rows=500, queries=2, id_shares=1e-3)
    explanation = explain(load, NETWORK_BOUND, "auto", "sdpa (as requested)", None)
    text = str(explanation)
    assert explanation.chosen == "owner"
    assert "16000 occurrences, 8000 distinct rows (L/U 2.00)" in text
    assert "-> owner" in text
    for e in explanation.estimates:
        line = next(
            x for x in text.splitlines() if x[3:].startswith("plain" if e.strategy == "positions" else e.strategy)
        )
        assert f"{e.bytes_sent / 1e6:.3f}" in line
        assert f"{e.flops / 1e9:.4f}" in line
        assert f"{e.memory / 1e6:.3f}" in line
    assert f"busiest owner over mean: {imbalance(load):.2f} expected" in text
    assert "strategy: owner (owner is estimated at" in text
    assert "backend: sdpa (as requested)" in text
    assert "est. ms: 1 GB/s and 1e+06 G operations/s" in text
    only = explain(load, NETWORK_BOUND, "auto", "sdpa", "it is self-attention")
    assert [e.strategy for e in only.estimates] == ["positions", "gather"]


def test_the_model_explains_a_batch_without_running_it() -> None:
    model = TokenizedAttention(2, 6, 1, nn.Embedding(9, 4))
    tokens, lengths = torch.tensor([[1, 1, 2, 2, 3, 3], [1, 4, 1, 4, 0, 0]]), torch.tensor([6, 4])
    explanation = model.explain(tokens, lengths)
    assert "10 occurrences, 5 distinct rows (L/U 2.00), 4 distinct ids, 5 queries" in str(explanation)
    assert "self-attention has as many queries as keys" in str(explanation)
    plain, gather = explanation.estimates
    assert plain.flops > gather.flops
    with_targets = model.explain(tokens, lengths, targets=torch.zeros(2, 1, dtype=torch.int64))
    assert [e.strategy for e in with_targets.estimates] == ["positions", "gather", "owner"]
    assert "2 queries" in str(with_targets)


def test_id_shares_are_squared_shares_of_rows() -> None:
    assert id_shares(torch.tensor([5, 5, 5, 7])) == pytest.approx((3 / 4) ** 2 + (1 / 4) ** 2)
    assert id_shares(torch.empty(0, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize("ranks", [8, 64])
def test_the_expected_imbalance_is_near_the_measured_one_under_zipf(ranks: int) -> None:
    vocab, samples, length = 200_000, 64, 4096
    weights = torch.arange(1, vocab + 1, dtype=torch.float64).pow(-1.05)
    generator = torch.Generator().manual_seed(0)
    drawn = weights.multinomial(samples * length, True, generator=generator).view(samples, length)
    rows = UniqueSpace.from_padded(drawn, torch.full((samples,), length)).tokens
    measured = []
    for salt in range(8):  # eight assignments of ids to owners
        owner = HashOwners(ranks).owner_of(rows + salt * 2**40)
        loads = torch.bincount(owner, minlength=ranks).double()
        measured.append(float(loads.max() / loads.mean()))
    expected = imbalance(workload(ranks=ranks, id_shares=id_shares(rows)))
    mean = sum(measured) / len(measured)
    assert 0.5 < (expected - 1) / (mean - 1) < 2.0, (expected, mean)
    assert imbalance(workload(ranks=1, id_shares=1.0)) == 1.0
