"""float32 and bfloat16 on several ranks against float64 attention over positions, at a head_dim that kernels take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import at_most
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, Rates, causal_over_ranks, pieces_of

BATCH, LENGTH, TARGETS, VOCAB, HEADS, HEAD_DIM = 2, 96, 5, 80, 2, 64
EMBED = HEADS * HEAD_DIM
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
MOVES = {"ring": Rates(1e9, 1e9, hop_seconds=0.0), "all-gather": Rates(1e9, 1e9, hop_seconds=1e9)}


def over_positions(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (T, H, D), k and v (L, H, D), all float64 -> (T, H, D)."""
    scores = torch.einsum("thd,lhd->htl", q, k) * HEAD_DIM**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), v)


def draw(rank: int, length: int) -> tuple[Tensor, Tensor]:
    """tokens (B, length), lengths (B,): some tokens are frequent, one sample is short."""
    g = torch.Generator().manual_seed(rank)
    tokens = (torch.rand(BATCH, length, generator=g) ** 2 * VOCAB).long()
    return tokens, torch.tensor([length, length // 3])


def far(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm())


def class_errors(dtype: torch.dtype, way: str) -> dict[str, float]:
    """Relative errors of the output and of each parameter's gradient, in strategy `way` of its layout."""
    group = SSPGroup(dist.group.WORLD)
    torch.manual_seed(0)
    maps = {name: nn.Linear(EMBED, EMBED, dtype=dtype) for name in ("query", "key", "value", "output")}
    sequence = way in MOVES
    model = TokenizedAttention(
        BATCH, LENGTH, group.size, nn.Embedding(VOCAB, EMBED, dtype=dtype), group=group, vocab_size=VOCAB, num_heads=HEADS,
        layout="sequence" if sequence else "sample", strategy="auto" if sequence else way, rates=MOVES.get(way), **maps,
    )  # fmt: skip
    parts = {name: getattr(model, name) for name in ("projections", "output", "embedding_fn")}
    exact: Any = copy.deepcopy(nn.ModuleDict(parts)).double()
    batches = [draw(rank, LENGTH) for rank in range(group.size)]
    targets = torch.randint(0, VOCAB, (BATCH, TARGETS), generator=torch.Generator().manual_seed(5))

    p, embed = exact.projections, exact.embedding_fn
    expected = torch.zeros(group.size, BATCH, TARGETS if way == "owner" else LENGTH, EMBED, dtype=torch.float64)
    for b in range(BATCH):
        read = [tokens[b, : int(lengths[b])] for tokens, lengths in batches]
        for rank, part in enumerate(read):
            rows = embed(torch.cat(read) if sequence else part)
            queries = p.queries(embed(targets[b]) if way == "owner" else embed(part))
            out = exact.output(over_positions(queries, *p.keys_values(rows)).flatten(1))
            expected[rank, b, : out.shape[0]] = out
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (expected * weights).sum().backward()

    options = {"targets": targets} if way == "owner" else {}
    out = model(*batches[group.rank], **options)
    assert out.dtype == dtype and out.device == group.device
    (out * weights[group.rank].to(dtype)).sum().backward()
    errors = {"output": far(out, expected[group.rank])}
    references = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.double()
        dist.all_reduce(grad)
        reference = references[name].grad
        if reference.norm() > 1e-6 * weights.norm():  # softmax does not see a key's bias
            errors[name] = far(grad, reference)
    return errors


def causal_errors(dtype: torch.dtype, _: str) -> dict[str, float]:
    group = SSPGroup(dist.group.WORLD)
    g = torch.Generator().manual_seed(9)
    table = torch.randn(VOCAB, 2, HEADS, HEAD_DIM, generator=g).to(dtype).requires_grad_()
    exact = table.detach().double().requires_grad_()
    count = 2 * group.size
    pieces = [draw(place, LENGTH // 2) for place in range(count)]
    queries = torch.randn(count, BATCH, LENGTH // 2, HEADS, HEAD_DIM, generator=g).to(dtype)
    wide, expected = queries.double().requires_grad_(), {}
    loss = torch.zeros((), dtype=torch.float64)
    for b in range(BATCH):
        sizes = [int(lengths[b]) for _, lengths in pieces]
        keys = exact[torch.cat([tokens[b, :n] for (tokens, _), n in zip(pieces, sizes, strict=True)])]
        q = torch.cat([wide[place, b, :n] for place, n in enumerate(sizes)])
        out = over_positions(q, keys[:, 0], keys[:, 1], causal=True)
        loss = loss + out.sin().sum()
        expected |= {(place, b): x for place, x in enumerate(out.split(sizes))}
    loss.backward()

    mine = (group.rank, count - 1 - group.rank)
    tokens, lengths = (torch.stack([pieces[place][i] for place in mine], 1) for i in (0, 1))
    reader = pieces_of(tokens, lengths)
    plan = CausalRows.of(reader, HashOwners(group.size), group)
    own = torch.cat([queries[place] for place in mine]).clone().requires_grad_()
    out, _ = causal_over_ranks(plan, reader.pack(own), *table[plan.owned.space.tokens].unbind(1))
    assert out.dtype == dtype and out.device == group.device
    out.sin().sum().backward()
    total = table.grad.double()
    dist.all_reduce(total)
    return {
        "output": far(out, torch.cat([expected[place, b] for place in mine for b in range(BATCH)])),
        "queries": far(own.grad, torch.cat([wide.grad[place] for place in mine])),
        "table": far(total, exact.grad),
    }


@pytest.mark.parametrize("way", ["gather", "owner", "ring", "all-gather", "causal"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])
def test_equals_float64_within_the_dtypes_precision(rank_pools: Any, dtype: torch.dtype, way: str) -> None:
    for errors in rank_pools(at_most(2)).run(causal_errors if way == "causal" else class_errors, dtype, way):
        print(way, dtype, {name: f"{error:.1e}" for name, error in errors.items()})
        assert all(error < TOLERANCE[dtype] for error in errors.values()), errors
