"""Calls of weighted_attention to test with, and what they must give, one query, head and key at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Ragged samples of (queries, keys), and which of the contract's options they use."""

    sizes: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 2
    weight: str = "shared"  # none, shared (K,) or per_head (K, H)
    absent: float = 0.0  # share of weights that are -inf
    chunks: int = 0  # rows of per-query weights; 0: one weight per key
    prefix: bool = False  # k_visible, with chunks
    causal: bool = False
    seed: int = 0


sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4).map(tuple)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1)])
weights = st.sampled_from(["none", "shared", "per_head"])
absences = st.sampled_from([0.0, 0.4, 1.0])


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tensors(problem: Problem, dtype: torch.dtype = torch.float64, dim: int = 4) -> dict[str, Any]:
    """The call's arguments; floating ones require gradients."""
    generator = torch.Generator().manual_seed(problem.seed)
    q_lengths, k_lengths = [s[0] for s in problem.sizes], [s[1] for s in problem.sizes]
    if problem.causal:
        k_lengths = q_lengths
    queries, keys = sum(q_lengths), sum(k_lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    call: dict[str, Any] = {
        "q": normal(queries, problem.heads, dim),
        "k": normal(keys, problem.kv_heads, dim),
        "v": normal(keys, problem.kv_heads, dim),
        "log_weight": None,
        "cu_seqlens_q": cu_seqlens(q_lengths),
        "cu_seqlens_k": cu_seqlens(k_lengths),
    }
    if problem.weight != "none":
        shape = ([problem.chunks] if problem.chunks else []) + [keys]
        shape += [problem.heads] if problem.weight == "per_head" else []
        weight = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        weight[torch.rand(shape, generator=generator) < problem.absent] = -torch.inf
        wide = torch.promote_types(dtype, torch.float32)
        call["log_weight"] = weight.to(wide).requires_grad_()
    if problem.chunks:
        call["q_chunk"] = torch.randint(0, problem.chunks, (queries,), generator=generator)
        if problem.prefix:
            call["k_visible"] = torch.randint(0, 7, (problem.chunks,), generator=generator).int()
    if problem.causal:
        call["causal"] = True
    return call


def by_loops(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One query, one head, one key at a time."""
    q, k, v, weight = call["q"], call["k"], call["v"], call["log_weight"]
    bounds_q, bounds_k = call["cu_seqlens_q"].tolist(), call["cu_seqlens_k"].tolist()
    out, lse = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.full(q.shape[:2], -torch.inf, dtype=q.dtype)
    outs: dict[tuple[int, int], Tensor] = {}
    lses: dict[tuple[int, int], Tensor] = {}
    for b in range(len(bounds_q) - 1):
        for i in range(bounds_q[b], bounds_q[b + 1]):
            chunk = call["q_chunk"][i] if "q_chunk" in call else None
            for h in range(q.shape[1]):
                g = h // (q.shape[1] // k.shape[1])
                scores, values = [], []
                for j in range(bounds_k[b], bounds_k[b + 1]):
                    place = j - bounds_k[b]
                    if call.get("causal") and place > i - bounds_q[b]:
                        continue
                    if "k_visible" in call and place >= int(call["k_visible"][chunk]):
                        continue
                    w = torch.zeros((), dtype=q.dtype)
                    if weight is not None:
                        w = (weight if chunk is None else weight[chunk])[j]
                        w = w if w.dim() == 0 else w[h]
                    if w > -torch.inf:
                        scores.append(q[i, h] @ k[j, g] * call.get("scale", q.shape[2] ** -0.5) + w)
                        values.append(v[j, g])
                if scores:
                    s = torch.stack(scores)
                    outs[i, h], lses[i, h] = torch.softmax(s, 0) @ torch.stack(values), s.logsumexp(0)
    if outs:
        at = tuple(torch.tensor(x) for x in zip(*outs, strict=True))
        out = out.index_put(at, torch.stack(list(outs.values())))
        lse = lse.index_put(at, torch.stack(list(lses.values())))
    return out, lse


def gradients(out: Tensor, lse: Tensor, call: dict[str, Any]) -> list[Tensor]:
    """Through out and lse at once, for every floating argument."""
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    c = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    finite = lse > -torch.inf
    loss = (out * a).sum() + (lse[finite] * c[finite]).sum()
    inputs = [x for x in (call["q"], call["k"], call["v"], call["log_weight"]) if x is not None]
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
