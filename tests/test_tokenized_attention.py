"""The RFC's class on 1, 2 and 4 ranks against attention over positions: outputs, gradients, repeats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracle import attention_over_positions
from repeats import check_step_twice
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention


@dataclass(frozen=True)
class Case:
    """One random problem; every rank builds the data of all ranks from the seed."""

    seed: int
    ranks: int = 1
    strategy: str = "gather"
    batch: int = 3
    length: int = 9
    vocab: int = 7
    heads: int = 2
    kv_heads: int = 2
    projected: bool = True
    normaliser: str = "softmax"
    mlp: bool = False
    targets: int | None = None
    cutoffs: bool = False
    include_self: bool = False
    bias: str = "none"
    value_term: bool = False
    empty_ranks: tuple[int, ...] = ()


class PairwiseMLP(nn.Module):
    """DIN's scorer: an MLP of (q, k, q - k, q * k) per head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * dim, 8), nn.Sigmoid(), nn.Linear(8, 1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = torch.broadcast_tensors(q, k)
        return self.layers(torch.cat([q, k, q - k, q * k], -1)).squeeze(-1)


def build(case: Case, group: SSPGroup | None) -> tuple[TokenizedAttention, nn.Embedding]:
    torch.manual_seed(case.seed)
    embed_dim, head_dim = 8, 4 if case.projected else 8 // case.heads
    table = nn.Embedding(case.vocab, embed_dim, dtype=torch.float64)
    maps: dict[str, nn.Module] = {}
    if case.projected:
        maps = {
            "query": nn.Linear(embed_dim, case.heads * head_dim),
            "key": nn.Linear(embed_dim, case.kv_heads * head_dim),
            "value": nn.Linear(embed_dim, case.kv_heads * head_dim),
            "output": nn.Linear(case.heads * head_dim, 5),
        }
    attention = TokenizedAttention(
        case.batch,
        case.length,
        case.ranks,
        table,
        group=group,
        vocab_size=case.vocab,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        score=PairwiseMLP(head_dim) if case.mlp else None,
        normaliser=case.normaliser,  # type: ignore[arg-type]
        activation=F.silu if case.normaliser == "none" and not case.mlp else None,
        include_self=case.include_self,
        strategy=case.strategy,
        **maps,
    )
    return attention.double(), table


def inputs_of(case: Case, rank: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(case.seed * 1009 + rank)
    b, n = case.batch, case.length
    lengths = torch.randint(0, n + 1, (b,), generator=g)
    if rank in case.empty_ranks:
        lengths.zero_()
    data: dict[str, Any] = {"tokens": torch.randint(0, case.vocab, (b, n), generator=g), "lengths": lengths}
    head_dim = 4 if case.projected else 8 // case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    if case.targets is not None:
        t = case.targets
        data["targets"] = torch.randint(0, case.vocab, (b, t), generator=g)
        data["target_lengths"] = torch.randint(0, t + 1, (b,), generator=g)
        if case.cutoffs:
            data["target_cutoffs"] = torch.randint(-1, n + 2, (b, t), generator=g)
    if case.bias != "none":
        side = normal(b, n, case.heads) if case.bias == "per_head" else normal(b, n)
        data["bias" if case.normaliser == "softmax" else "multiplier"] = side
    if case.value_term:
        data["value_term"] = normal(b, n, case.kv_heads, head_dim)
    return data


def over_positions(attention: TokenizedAttention, table: nn.Embedding, data: dict[str, Any]) -> Tensor:
    """The same call by the oracle, sample by sample."""
    p, scoring = attention.projections, attention.scoring
    samples = []
    for b, length in enumerate(data["lengths"].tolist()):
        x = table(data["tokens"][b, :length])
        k, v = p.keys_values(x)
        sides = {name: data[name][b, :length] for name in ("bias", "multiplier", "value_term") if name in data}
        visible = own = None
        if "targets" in data:
            count = int(data["target_lengths"][b])
            y = table(data["targets"][b, :count])
            if "target_cutoffs" in data:
                visible = torch.arange(length) < data["target_cutoffs"][b, :count, None]
            own = p.keys_values(y) if attention.include_self else None
        else:
            y = x
        out = attention_over_positions(
            p.queries(y), k, v, score=scoring.score, normaliser=scoring.normaliser, activation=scoring.activation,
            visible=visible, own=own, **sides,
        ).flatten(1)  # fmt: skip
        out = out if attention.output is None else attention.output(out)
        width = (data["targets"] if "targets" in data else data["tokens"]).shape[1]
        samples.append(F.pad(out, (0, 0, 0, width - out.shape[0])))
    return torch.stack(samples)


def check(case: Case) -> None:
    """Run on every rank: own outputs, and the gradient of the sum of all ranks' losses."""
    rank, group = 0, None
    if case.ranks > 1:
        rank, group = dist.get_rank(), SSPGroup(dist.group.WORLD)
    attention, table = build(case, group)
    weigh = torch.Generator().manual_seed(99)
    everything = [inputs_of(case, r) for r in range(case.ranks)]

    expected = [over_positions(attention, table, data) for data in everything]
    coefficients = [torch.randn(e.shape, generator=weigh, dtype=e.dtype) for e in expected]
    parameters = dict(attention.named_parameters())
    loss = sum((e * c).sum() for e, c in zip(expected, coefficients, strict=True))
    (
        loss + sum(0 * p.sum() for p in parameters.values())
    ).backward()  # with no occurrence at all nothing else has a gradient
    expected_grads = {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()
    }
    mine = everything[rank]
    sides = [x for x in mine.values() if x.requires_grad]
    expected_side_grads = [x.grad.clone() if x.grad is not None else torch.zeros_like(x) for x in sides]

    check_step_twice(
        lambda: attention(**mine),
        expected[rank],
        coefficients[rank],
        parameters,
        expected_grads,
        sides,
        expected_side_grads,
        case.ranks,
    )


@st.composite
def cases(draw: Any, ranks: int) -> Case:
    targets = draw(st.sampled_from([None, 0, 1, 3]))
    normaliser = draw(st.sampled_from(["softmax", "none"]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2)]))
    projected = draw(st.booleans()) or heads != kv_heads
    strategy = draw(
        st.sampled_from(
            ["gather", "positions", "auto"] if targets is None else ["gather", "owner", "positions", "auto"]
        )
    )
    return Case(
        seed=draw(st.integers(0, 10**6)),
        ranks=ranks,
        strategy=strategy,
        batch=draw(st.integers(1, 4)),
        length=draw(st.integers(1, 9)),
        vocab=draw(st.sampled_from([1, 3, 50])),
        heads=heads,
        kv_heads=kv_heads,
        projected=projected,
        normaliser=normaliser,
        mlp=draw(st.booleans()),
        targets=targets,
        cutoffs=targets is not None and draw(st.booleans()),
        include_self=targets is not None and draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "shared", "per_head"])),
        value_term=draw(st.booleans()),
        empty_ranks=tuple(draw(st.sets(st.integers(0, ranks - 1)))),
    )


@hypothesis_settings(max_examples=120)
@given(cases(1))
def test_one_rank_equals_attention_over_positions(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_attention_over_positions(rank_pools: Any, ranks: int) -> None:
    @hypothesis_settings(max_examples=40)
    @given(cases(ranks))
    def on_every_rank(case: Case) -> None:
        rank_pools(ranks).run(check, case)

    on_every_rank()


@pytest.mark.parametrize("strategy", ["gather", "owner"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_with_nothing_still_takes_part(rank_pools: Any, ranks: int, strategy: str) -> None:
    case = Case(seed=5, ranks=ranks, strategy=strategy, targets=2, bias="per_head", value_term=True)
    rank_pools(ranks).run(check, replace(case, empty_ranks=(0,)))
    rank_pools(ranks).run(check, replace(case, empty_ranks=tuple(range(ranks))))
    rank_pools(ranks).run(check, replace(case, vocab=1))  # one owner owns everything, the others nothing
