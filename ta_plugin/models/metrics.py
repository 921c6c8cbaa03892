"""Full-ranking metrics for leave-one-out evaluation: AUC, HR@k and NDCG@k, and the popularity baseline.

Each user has one positive, ranked among all items except those the user has seen. Metrics come as sums, so that ranks
add theirs up with one all-reduce before `mean_metrics` divides.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def positive_ranks(scores: Tensor, positive: Tensor, seen: Tensor) -> Tensor:
    """Rank of each sample's positive among its candidates; 0 is best.

    Candidates are the items not seen, and the positive itself even if it was seen. The rank is the number of other
    candidates with a greater score plus half the number with an equal one, so that a model which scores all items
    alike ranks the positive in the middle, whatever the order of the items.

    Args:
        scores: float `(B, V)`; infinities are allowed, NaN is not.
        positive: int64 `(B,)`, item in [0, V).
        seen: bool `(B, V)`, True where the item is excluded.

    Returns:
        float64 `(B,)`, a multiple of 0.5.

    Raises:
        ValueError: shapes or dtypes do not fit, a positive is out of range, or a score is NaN.
    """
    _check(positive, seen)
    if scores.shape != seen.shape or not scores.is_floating_point():
        raise ValueError(
            f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}; it must be floating point of the shape "
            f"of seen, {tuple(seen.shape)}"
        )
    if torch.isnan(scores).any():
        raise ValueError(f"scores holds {int(torch.isnan(scores).sum())} NaN; a ranking needs numbers, check the model")
    own = scores.gather(1, positive[:, None])
    others = (~seen).scatter(1, positive[:, None], False)
    greater = ((scores > own) & others).sum(1)
    equal = ((scores == own) & others).sum(1)
    return greater.double() + 0.5 * equal.double()


def candidate_counts(positive: Tensor, seen: Tensor) -> Tensor:
    """Number of items ranked for each sample, int64 `(B,)`: those not seen, with the positive counted once.

    Args:
        positive: int64 `(B,)`, item in [0, V).
        seen: bool `(B, V)`, True where the item is excluded.
    """
    _check(positive, seen)
    return (~seen).scatter(1, positive[:, None], True).sum(1)


def ranking_metrics(
    ranks: Tensor, n_candidates: Tensor | int, k: int = 10, *, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums of the metrics over samples.

    A positive of rank r among C candidates has AUC `1 - r / (C - 1)` (0.5 where it is the only candidate), HR@k
    `1 if r < k else 0`, and NDCG@k `1 / log2(r + 2) if r < k else 0`.

    Args:
        ranks: `(B,)` as `positive_ranks` returns them.
        n_candidates: `(B,)` or one number for all, the positive included.
        k: cutoff of HR and NDCG, at least 1.
        weights: `(B,)`, 0 for samples that pad a batch; None counts each sample once.

    Returns:
        float64 scalars under `count` (the sum of weights), `auc`, `hr@<k>` and `ndcg@<k>`, which add over batches and
        processes.

    Raises:
        ValueError: k < 1, shapes differ, or a rank is outside [0, n_candidates) where the weight is not 0.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    ranks = ranks.double()
    weight = torch.ones_like(ranks) if weights is None else weights.to(ranks)
    candidates = torch.as_tensor(n_candidates, device=ranks.device).double().expand_as(ranks)
    if weight.shape != ranks.shape:
        raise ValueError(f"weights has shape {tuple(weight.shape)}; it must have that of ranks, {tuple(ranks.shape)}")
    valid = (ranks >= 0) & (ranks < candidates)
    if not (valid | (weight == 0)).all():
        wrong = int(torch.nonzero(~valid & (weight != 0))[0])
        raise ValueError(
            f"ranks[{wrong}]={ranks[wrong].item()} must lie in [0, n_candidates={candidates[wrong].item():.0f}); "
            "n_candidates counts the positive too"
        )
    auc = torch.where(candidates > 1, 1 - ranks / (candidates - 1).clamp(min=1), 0.5)
    hit = (ranks < k).double()
    gain = hit / torch.log2(ranks.clamp(min=0) + 2)
    used = weight != 0  # whatever stands in a padding sample, NaN too, does not count
    return {
        "count": weight.sum(),
        "auc": (auc * weight)[used].sum(),
        f"hr@{k}": (hit * weight)[used].sum(),
        f"ndcg@{k}": (gain * weight)[used].sum(),
    }


def mean_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means from the sums of `ranking_metrics`, added up over batches and processes: all but `count`, divided by it.

    Raises:
        ValueError: `count` is 0.
    """
    count = float(sums["count"])
    if count == 0:
        raise ValueError("sums: count=0, so there is nothing to average; evaluate at least one sample")
    return {name: float(value) / count for name, value in sums.items() if name != "count"}


def popularity_scores(items: Tensor | np.ndarray, n_items: int) -> Tensor:
    """How often each item occurs, float64 `(n_items,)`: the score of the popularity baseline.

    Args:
        items: int64 `(n,)`, item codes of the training events.
        n_items: number of items.

    Raises:
        ValueError: an item is outside [0, n_items).
    """
    items = torch.as_tensor(items)
    if items.numel() and (int(items.min()) < 0 or int(items.max()) >= n_items):
        raise ValueError(
            f"items range from {int(items.min())} to {int(items.max())}; they must lie in [0, n_items={n_items})"
        )
    return torch.bincount(items, minlength=n_items).double()


def _check(positive: Tensor, seen: Tensor) -> None:
    if seen.dim() != 2 or seen.dtype != torch.bool:
        raise ValueError(f"seen has shape {tuple(seen.shape)} and dtype {seen.dtype}; it must be bool (B, V)")
    if positive.shape != seen.shape[:1] or positive.dtype != torch.int64:
        raise ValueError(
            f"positive has shape {tuple(positive.shape)} and dtype {positive.dtype}; it must be int64 ({len(seen)},)"
        )
    if positive.numel() and (int(positive.min()) < 0 or int(positive.max()) >= seen.shape[1]):
        raise ValueError(
            f"positive ranges from {int(positive.min())} to {int(positive.max())}; items lie in [0, {seen.shape[1]})"
        )
