"""Ranks and metrics equal those of a loop over the candidates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ta_plugin.models.metrics import (
    candidate_counts,
    mean_metrics,
    popularity_scores,
    positive_ranks,
    ranking_metrics,
)


@given(st.data())
def test_ranks_and_metrics_equal_a_loop(data: st.DataObject) -> None:
    b, v, k = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    # few distinct scores, so that ties abound
    score = st.sampled_from([-math.inf, -1.0, 0.0, 1.0, math.inf])
    scores = data.draw(st.lists(st.lists(score, min_size=v, max_size=v), min_size=b, max_size=b))
    seen = data.draw(st.lists(st.lists(st.booleans(), min_size=v, max_size=v), min_size=b, max_size=b))
    positive = data.draw(st.lists(st.integers(0, v - 1), min_size=b, max_size=b))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=b, max_size=b))

    ranks, counts = [], []
    sums = {"count": 0.0, "auc": 0.0, f"hr@{k}": 0.0, f"ndcg@{k}": 0.0}
    for i in range(b):
        others = [scores[i][j] for j in range(v) if j != positive[i] and not seen[i][j]]
        own = scores[i][positive[i]]
        wins = sum(1.0 if own > s else 0.5 if own == s else 0.0 for s in others)
        ranks.append(len(others) - wins)
        counts.append(len(others) + 1)
        sums["count"] += weights[i]
        sums["auc"] += weights[i] * (wins / len(others) if others else 0.5)
        if ranks[i] < k:
            sums[f"hr@{k}"] += weights[i]
            sums[f"ndcg@{k}"] += weights[i] / math.log2(ranks[i] + 2)

    scores_t = torch.tensor(scores, dtype=torch.float32).reshape(b, v)
    positive_t = torch.tensor(positive, dtype=torch.int64)
    seen_t = torch.tensor(seen, dtype=torch.bool).reshape(b, v)
    got = positive_ranks(scores_t, positive_t, seen_t)
    assert got.dtype == torch.float64 and got.tolist() == ranks
    n_candidates = candidate_counts(positive_t, seen_t)
    assert n_candidates.tolist() == counts
    metrics = ranking_metrics(got, n_candidates, k, weights=torch.tensor(weights))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(sums)
    if sums["count"]:
        expected = {name: value / sums["count"] for name, value in sums.items() if name != "count"}
        assert mean_metrics(metrics) == pytest.approx(expected)


def test_a_constant_model_is_at_chance() -> None:
    ranks = positive_ranks(torch.zeros(1, 101), torch.tensor([3]), torch.zeros(1, 101, dtype=torch.bool))
    assert ranks.tolist() == [50.0]
    metrics = mean_metrics(ranking_metrics(ranks, 101))
    assert metrics == {"auc": 0.5, "hr@10": 0.0, "ndcg@10": 0.0}


def test_sums_add_over_batches() -> None:
    ranks = torch.tensor([0.0, 3.5, 20.0, 9.5])
    whole = ranking_metrics(ranks, 50)
    parts = [ranking_metrics(part, 50) for part in ranks.split(3)]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(part[name].item() for part in parts))
    assert whole["count"] == 4 and whole["hr@10"] == 3


def test_padding_samples_do_not_count_whatever_they_hold() -> None:
    ranks, weights = torch.tensor([1.0, math.nan, 99.0]), torch.tensor([1.0, 0.0, 0.0])
    expected = ranking_metrics(ranks[:1], 5)
    assert ranking_metrics(ranks, 5, weights=weights) == expected


def test_popularity_counts_items() -> None:
    scores = popularity_scores(torch.tensor([3, 1, 3]), 5)
    assert scores.tolist() == [0, 1, 0, 2, 0]
    assert popularity_scores(torch.tensor([3, 1, 3]).numpy(), 5).tolist() == scores.tolist()
    assert popularity_scores(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 0]
    for items in ([5], [-1]):
        with pytest.raises(ValueError, match=r"n_items=5"):
            popularity_scores(torch.tensor(items), 5)


def test_bad_arguments() -> None:
    scores, positive, seen = torch.zeros(2, 3), torch.tensor([0, 2]), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="scores holds 1 NaN"):
        positive_ranks(torch.tensor([[0, 0, 0], [0, math.nan, 0]]), positive, seen)
    with pytest.raises(ValueError, match="scores has shape"):
        positive_ranks(scores[:, :2], positive, seen)
    with pytest.raises(ValueError, match=r"scores has shape .*int64"):
        positive_ranks(scores.long(), positive, seen)
    with pytest.raises(ValueError, match="seen has shape"):
        positive_ranks(scores, positive, seen.long())
    with pytest.raises(ValueError, match="positive has shape"):
        positive_ranks(scores, positive[:1], seen)
    with pytest.raises(ValueError, match="positive ranges from 0 to 3"):
        candidate_counts(torch.tensor([0, 3]), seen)
    with pytest.raises(ValueError, match="k=0"):
        ranking_metrics(torch.zeros(2), 3, 0)
    with pytest.raises(ValueError, match="weights has shape"):
        ranking_metrics(torch.zeros(2), 3, weights=torch.ones(3))
    for rank in (3.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"ranks\[1\]"):
            ranking_metrics(torch.tensor([0.0, rank]), 3)
    with pytest.raises(ValueError, match="nothing to average"):
        mean_metrics(ranking_metrics(torch.zeros(0), 3))
