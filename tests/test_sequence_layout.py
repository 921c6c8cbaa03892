"""Layout "sequence" on 1, 2 and 4 ranks against attention over the positions of the joined chunks: outputs, gradients, repeats."""

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
from ta_plugin.strategies import OwnedRows, Rates, row_attention

EMBED, HEAD_DIM = 8, 4
NEVER, ALWAYS = Rates(1e9, 1e9, hop_seconds=1e9), Rates(1e9, 1e9, hop_seconds=0.0)


@dataclass(frozen=True)
class Case:
    """One random problem; every rank builds the chunks of all ranks from the seed."""

    seed: int
    ranks: int = 1
    batch: int = 3
    longest: int = 7
    vocab: int = 7
    heads: int = 2
    kv_heads: int = 2
    normaliser: str = "softmax"
    mlp: bool = False
    bias: str = "none"
    value_term: bool = False
    encode: bool = False
    targets: int | None = None
    cutoffs: bool = False
    include_self: bool = False
    circulate: bool = True
    distinct: bool = False
    empty_ranks: tuple[int, ...] = ()


class PairwiseMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * HEAD_DIM, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = torch.broadcast_tensors(q, k)
        return self.layers(torch.cat([q - k, q * k], -1)).squeeze(-1)


class Layer(nn.Module):
    """A pre-norm transformer layer, on distinct rows or on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(EMBED), nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)
        self.mlp = nn.Sequential(nn.Linear(EMBED, EMBED), nn.GELU(), nn.Linear(EMBED, EMBED))

    def heads(self, rows: Tensor) -> list[Tensor]:
        return [x.unflatten(1, (2, HEAD_DIM)) for x in self.qkv(self.norm(rows)).chunk(3, -1)]

    def rest(self, rows: Tensor, mixed: Tensor) -> Tensor:
        rows = rows + self.out(mixed.flatten(1))
        return rows + self.mlp(rows)


def build(case: Case, group: SSPGroup | None, width: int) -> tuple[TokenizedAttention, nn.Embedding, nn.ModuleList]:
    torch.manual_seed(case.seed)
    table = nn.Embedding(case.vocab, EMBED, dtype=torch.float64)
    layers = nn.ModuleList(Layer() for _ in range(2 if case.encode else 0)).double()
    attention = TokenizedAttention(
        case.batch,
        width,
        case.ranks,
        table,
        group=group,
        vocab_size=case.vocab,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        score=PairwiseMLP() if case.mlp else None,
        normaliser=case.normaliser,  # type: ignore[arg-type]
        activation=F.silu if case.normaliser == "none" and not case.mlp else None,
        include_self=case.include_self,
        layout="sequence",
        query=nn.Linear(EMBED, case.heads * HEAD_DIM),
        key=nn.Linear(EMBED, case.kv_heads * HEAD_DIM),
        value=nn.Linear(EMBED, case.kv_heads * HEAD_DIM),
        output=nn.Linear(case.heads * HEAD_DIM, 5),
        rates=ALWAYS if case.circulate else NEVER,
    ).double()
    return attention, table, layers


def chunk_of(case: Case, rank: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(case.seed * 1009 + rank)
    b, n = case.batch, int(torch.randint(1, case.longest + 1, (), generator=g))
    lengths = torch.randint(0, n + 1, (b,), generator=g)
    if rank in case.empty_ranks:
        lengths.zero_()
    if case.distinct:
        tokens = torch.arange(b * n).view(b, n) + rank * b * n
        tokens %= case.vocab
    else:
        tokens = torch.randint(0, case.vocab, (b, n), generator=g)
    data = {"tokens": tokens, "lengths": lengths}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    if case.targets is not None:
        t = int(torch.randint(0, case.targets + 1, (), generator=g))
        data["targets"] = torch.randint(0, case.vocab, (b, t), generator=g)
        data["target_lengths"] = torch.randint(0, t + 1, (b,), generator=g)
        if case.cutoffs:
            data["target_cutoffs"] = torch.randint(-1, case.ranks * case.longest, (b, t), generator=g)
    if case.bias != "none":
        side = normal(b, n, case.heads) if case.bias == "per_head" else normal(b, n)
        data["bias" if case.normaliser == "softmax" else "multiplier"] = side
    if case.value_term:
        data["value_term"] = normal(b, n, case.kv_heads, HEAD_DIM)
    return data


def over_positions(
    attention: TokenizedAttention, table: nn.Embedding, layers: nn.ModuleList, chunks: list[dict[str, Tensor]]
) -> list[Tensor]:
    """What each rank shall get: the oracle on every sample's joined chunks."""
    p, scoring = attention.projections, attention.scoring
    sides = [name for name in ("bias", "multiplier", "value_term") if name in chunks[0]]
    outs: list[list[Tensor]] = [[] for _ in chunks]
    for b in range(attention.batch_size):
        parts = [int(c["lengths"][b]) for c in chunks]
        x = table(torch.cat([c["tokens"][b, :n] for c, n in zip(chunks, parts, strict=True)]))
        for layer in layers:
            x = layer.rest(x, attention_over_positions(*layer.heads(x)))
        k, v = p.keys_values(x)
        joined = {name: torch.cat([c[name][b, :n] for c, n in zip(chunks, parts, strict=True)]) for name in sides}
        options: dict[str, Any] = {
            "score": scoring.score, "normaliser": scoring.normaliser, "activation": scoring.activation, **joined
        }  # fmt: skip
        if "targets" not in chunks[0]:
            whole = attention.output(attention_over_positions(p.queries(x), k, v, **options).flatten(1))  # type: ignore[misc]
            pieces = whole.split(parts)
        else:
            pieces = []
            for c in chunks:
                count = int(c["target_lengths"][b])
                y = table(c["targets"][b, :count])
                visible = None
                if "target_cutoffs" in c:
                    visible = torch.arange(k.shape[0]) < c["target_cutoffs"][b, :count, None]
                own = p.keys_values(y) if attention.include_self else None
                out = attention_over_positions(p.queries(y), k, v, visible=visible, own=own, **options)
                pieces.append(attention.output(out.flatten(1)))  # type: ignore[misc]
        for rank, (piece, c) in enumerate(zip(pieces, chunks, strict=True)):
            width = c["targets" if "targets" in c else "tokens"].shape[1]
            outs[rank].append(F.pad(piece, (0, 0, 0, width - piece.shape[0])))
    return [torch.stack(o) for o in outs]


def check(case: Case) -> None:
    """Run on every rank: own outputs, and the gradient of the sum of all ranks' losses."""
    rank, group = 0, None
    if case.ranks > 1:
        rank, group = dist.get_rank(), SSPGroup(dist.group.WORLD)
    chunks = [chunk_of(case, r) for r in range(case.ranks)]
    attention, table, layers = build(case, group, chunks[rank]["tokens"].shape[1])
    weigh = torch.Generator().manual_seed(99)

    expected = over_positions(attention, table, layers, chunks)
    coefficients = [torch.randn(e.shape, generator=weigh, dtype=e.dtype) for e in expected]
    parameters = {**dict(attention.named_parameters()), **dict(layers.named_parameters())}
    loss = sum((e * c).sum() for e, c in zip(expected, coefficients, strict=True))
    (loss + sum(0 * p.sum() for p in parameters.values())).backward()
    expected_grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    mine = chunks[rank]
    sides = [x for x in mine.values() if x.requires_grad]
    side_grads = [x.grad.clone() if x.grad is not None else torch.zeros_like(x) for x in sides]

    def encode(rows: Tensor, space: OwnedRows) -> Tensor:
        for layer in layers:
            rows = layer.rest(rows, row_attention(space, *layer.heads(rows)))
        return rows

    check_step_twice(
        lambda: attention(**mine, encode=encode if case.encode else None),
        expected[rank],
        coefficients[rank],
        parameters,
        expected_grads,
        sides,
        side_grads,
        case.ranks,
    )


@st.composite
def cases(draw: Any, ranks: int) -> Case:
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2)]))
    targets = draw(st.sampled_from([None, None, 3]))
    return Case(
        seed=draw(st.integers(0, 10**6)),
        ranks=ranks,
        batch=draw(st.integers(1, 3)),
        longest=draw(st.integers(1, 7)),
        vocab=draw(st.sampled_from([1, 3, 50])),
        heads=heads,
        kv_heads=kv_heads,
        normaliser=draw(st.sampled_from(["softmax", "none"])),
        mlp=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "shared", "per_head"])),
        value_term=draw(st.booleans()),
        encode=draw(st.booleans()),
        targets=targets,
        cutoffs=targets is not None and draw(st.booleans()),
        include_self=targets is not None and draw(st.booleans()),
        circulate=draw(st.booleans()),
        empty_ranks=tuple(draw(st.sets(st.integers(0, ranks - 1)))),
    )


@hypothesis_settings(max_examples=40)
@given(cases(1))
def test_one_rank_equals_attention_over_positions(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_attention_over_joined_chunks(rank_pools: Any, ranks: int) -> None:
    @hypothesis_settings(max_examples=30)
    @given(cases(ranks))
    def on_every_rank(case: Case) -> None:
        rank_pools(ranks).run(check, case)

    on_every_rank()


@pytest.mark.parametrize("circulate", [True, False], ids=["ring", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_corners(rank_pools: Any, ranks: int, circulate: bool) -> None:
    case = Case(seed=5, ranks=ranks, circulate=circulate, encode=True)
    run = rank_pools(ranks).run
    run(check, replace(case, vocab=1))  # one hot token: one rank owns everything
    run(check, replace(case, vocab=1000, distinct=True))  # no weights travel
    run(check, replace(case, empty_ranks=(0,), bias="per_head", value_term=True))
    run(check, replace(case, empty_ranks=tuple(range(1, ranks))))  # one rank reads everything
    run(check, replace(case, empty_ranks=tuple(range(ranks))))  # nobody reads anything
