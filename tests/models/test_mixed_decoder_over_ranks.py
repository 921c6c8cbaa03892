"""A mixed stack over a sequence that lies on several ranks equals the same stack on one rank, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import RankPool
from torch import Tensor

from ta_plugin import SSPGroup
from ta_plugin.models.mixed_decoder import MixedDecoder, MixedDecoderConfig
from ta_plugin.strategies import Halo, zigzag

Pools = Callable[[int], RankPool]
CONFIG = MixedDecoderConfig(23, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, global_every=2, window=5)


@dataclass(frozen=True)
class Case:
    """sizes: of every sample's pieces in the order of the sequence (B, N * P)."""

    ranks: int
    sizes: tuple[tuple[int, ...], ...]
    config: MixedDecoderConfig = CONFIG
    contiguous: bool = False
    chunk: int | None = 3

    @property
    def places(self) -> list[tuple[int, ...]] | None:
        return [(rank,) for rank in range(self.ranks)] if self.contiguous else None


def whole(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Tokens and next tokens of each sample, by Zipf."""
    g = torch.Generator().manual_seed(3)
    share = 1.0 / torch.arange(1, case.config.vocab_size + 1)
    samples = (torch.multinomial(share, sum(n) + 1, replacement=True, generator=g) for n in case.sizes)
    return [(ids[:-1], ids[1:]) for ids in samples]


def pieces(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens and labels (B, P, L) and lengths (B, P) that a rank reads."""
    mine = zigzag(case.ranks)[rank] if case.places is None else case.places[rank]
    longest = max(max(n) for n in case.sizes)
    lengths = torch.tensor([[n[p] for p in mine] for n in case.sizes])
    grids = torch.full((2, *lengths.shape, longest), -7)  # what lies past a length is never read
    for b, (sample, sizes) in enumerate(zip(whole(case), case.sizes, strict=True)):
        for which, ids in enumerate(sample):
            for i, p in enumerate(mine):
                grids[which, b, i, : sizes[p]] = ids.split(sizes)[p]
    return grids[0], grids[1], lengths


def model_of(config: MixedDecoderConfig) -> MixedDecoder:
    """Where the tensors of tests are."""
    torch.manual_seed(0)
    return MixedDecoder(config).double().to(torch.empty(0).device)


def check(case: Case) -> None:
    group = SSPGroup(dist.group.WORLD if case.ranks > 1 else None)
    samples, expected = whole(case), model_of(case.config)
    ids, labels = (torch.cat([sample[i] for sample in samples]) for i in range(2))
    bounds = torch.tensor([0] + [sum(n) for n in case.sizes]).cumsum(0)
    want = expected(ids, bounds, plan=expected.plan(ids, bounds, 4))
    F.cross_entropy(want, labels, reduction="sum").backward()
    logits = {
        (b, p): x for b, n in enumerate(case.sizes) for p, x in enumerate(want[bounds[b] : bounds[b + 1]].split(n))
    }

    model = model_of(case.config)
    tokens, labels, lengths = pieces(case, group.rank)
    mine = (zigzag(case.ranks) if case.places is None else case.places)[group.rank]
    split = model.plan_over_ranks(tokens, lengths, group, places=case.places, chunk=case.chunk)
    got = model.over_ranks(split)
    ordered = torch.cat([logits[b, p] for p in mine for b in range(len(case.sizes))])
    torch.testing.assert_close(got, ordered, rtol=0, atol=1e-10)
    F.cross_entropy(got, split.pack(labels), reduction="sum").backward()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None, name
        total = parameter.grad.clone()
        if group.group is not None:
            dist.all_reduce(total)
        torch.testing.assert_close(total, other.grad, rtol=1e-10, atol=1e-10, msg=name)


def uneven(ranks: int, samples: int, seed: int, longest: int = 9) -> tuple[tuple[int, ...], ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(0, longest, (2 * ranks,), generator=g).tolist()) for _ in range(samples))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_equal_one_rank(rank_pools: Pools, ranks: int) -> None:
    case = Case(ranks, uneven(ranks, 2, ranks))
    learned = replace(CONFIG, decay="learned", value_tables=True)
    short = tuple((*n[:-1], 1) for n in uneven(ranks, 2, 5, 3))  # the window reaches through several pieces
    cases = [
        case,
        replace(case, config=learned, chunk=None),
        replace(case, sizes=short, config=replace(CONFIG, window=8, decay="alibi")),
        replace(case, sizes=tuple(n[:ranks] for n in case.sizes), contiguous=True),
        replace(case, config=replace(learned, global_every=1, window=None)),
        replace(case, config=replace(CONFIG, window=1), sizes=((0,) * (2 * ranks), (0,) * ranks + (4,) * ranks)),
        replace(case, sizes=((4, *(0,) * (2 * ranks - 2), 3),)),  # rank 0 reads everything
    ]
    for each in cases:
        (rank_pools(ranks).run(check, each) if ranks > 1 else check(each))


def sent_by_windows(sizes: tuple[int, ...]) -> int:
    group = SSPGroup(dist.group.WORLD)
    model = model_of(replace(CONFIG, num_layers=1))
    lengths = torch.tensor([[sizes[p] for p in zigzag(2)[group.rank]]])
    split = model.plan_over_ranks(torch.zeros(1, 2, max(sizes), dtype=torch.int64), lengths, group)
    model.over_ranks(split)
    return group.traffic.elements["window"] // (2 * 2 * 4)  # keys and values, their heads and dimensions


def test_windows_send_the_positions_they_reach_and_no_more(rank_pools: Pools) -> None:
    before = CONFIG.window - 1
    for sizes, sent in (
        ((10, 10, 10, 10), [before, before]),  # pieces 0 1 2 3 on ranks 0 1 1 0: 0 to 1, 2 to 3, and 1 to 2 on one rank
        ((40, 40, 40, 40), [before, before]),
        ((40, 40, 40, 0), [before, 0]),  # nothing to see for an empty piece
        ((40, 1, 1, 9), [before + before - 1, 2]),
    ):
        assert rank_pools(2).run(sent_by_windows, sizes) == sent


def failures() -> list[str]:
    group, messages = SSPGroup(dist.group.WORLD), []
    model = MixedDecoder(CONFIG)
    tokens, lengths = torch.zeros(2, 2, 4, dtype=torch.int64), torch.full((2, 2), 4)
    good: dict[str, Any] = {"tokens": tokens, "lengths": lengths}
    bad = [
        {"tokens": tokens + 23},
        {"tokens": tokens - 1},
        {"lengths": lengths + 1},
        {"lengths": lengths[0]},
        {"chunk": 0},
    ]
    for wrong in bad:
        try:
            model.plan_over_ranks(**(good | wrong if group.rank == 1 else good), group=group)
        except ValueError as error:
            messages.append(str(error))
    try:
        MixedDecoder(replace(CONFIG, window=None)).plan_over_ranks(**good, group=group)
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_what_is_wrong_on_one_rank_raises_on_both(rank_pools: Pools) -> None:
    first, second = rank_pools(2).run(failures)
    assert first == second and len(first) == 6
    for message, says in zip(
        first, ("[23, 23]", "[-1, -1]", "lengths lie in", "pass (B, P, L)", "chunk is 0", "window is None"), strict=True
    ):
        assert says in message
    assert all(message.startswith("rank 1 of 2: ") for message in first[:5])


def test_a_halo_reaches_back_not_forth() -> None:
    model = MixedDecoder(CONFIG)
    split = model.plan_over_ranks(torch.zeros(1, 2, 4, dtype=torch.int64), torch.tensor([[4, 4]]), SSPGroup(None))
    with pytest.raises(ValueError, match="before is -1"):
        Halo.of(split.rows, -1)
