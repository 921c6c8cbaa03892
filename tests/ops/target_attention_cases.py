"""Inputs of target attention, and loops over queries and heads in float64 that say what comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ta_plugin.attention import target_attention

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
WEIGHTS = [None, "key", "head", "pair", "pair_head"]
NAMES = ("out", "lse", "dq", "dk", "dv", "dweight")


class Case(NamedTuple):
    q: Tensor
    k_table: Tensor
    v_table: Tensor | None
    rows: Tensor
    lengths_q: list[int]
    lengths_k: list[int]
    weight: Tensor | None
    q_chunk: Tensor | None
    normaliser: str
    activation: Any
    grads: tuple[Tensor, Tensor]

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.tensor([0, *x], device=self.q.device).cumsum(0).int() for x in (self.lengths_q, self.lengths_k)
        )


def draw(
    device: str,
    lengths_q: list[int],
    lengths_k: list[int],
    *,
    table: int = 23,
    heads: int = 4,
    heads_kv: int = 1,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    one_table: bool = True,
    weights: str | None = "key",
    normaliser: str = "softmax",
    activation: Any = None,
    absent: float = 0.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    queries, keys, targets = sum(lengths_q), sum(lengths_k), max([*lengths_q, 1])
    q, dout = (torch.randn(queries, heads, dim, generator=g).to(dtype) for _ in range(2))
    tables = [torch.randn(table, heads_kv, dim, generator=g).to(dtype) for _ in range(1 if one_table else 2)]
    rows = torch.randint(0, max(table, 1), (keys,), generator=g)
    shape = {
        None: None,
        "key": (keys,),
        "head": (keys, heads),
        "pair": (targets, keys),
        "pair_head": (targets, keys, heads),
    }
    weight, chunk = None, None
    if weights is not None:
        weight = torch.randn(shape[weights], generator=g, dtype=torch.promote_types(dtype, torch.float32))
        if normaliser == "softmax":
            weight[torch.rand(weight.shape, generator=g) < absent] = -torch.inf
        if weights.startswith("pair"):
            chunk = torch.cat([torch.arange(n) for n in lengths_q] or [torch.zeros(0, dtype=torch.int64)])
    dlse = torch.randn(queries, heads, generator=g, dtype=torch.promote_types(dtype, torch.float32))
    moved = [
        None if x is None else x.to(device)
        for x in (q, tables[0], None if one_table else tables[1], rows, weight, chunk, dout, dlse)
    ]
    return Case(*moved[:4], lengths_q, lengths_k, *moved[4:6], normaliser, activation, tuple(moved[6:]))  # type: ignore[arg-type]


def run(case: Case, backend: str = "compiled") -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = [
        None if x is None else x.detach().requires_grad_() for x in (case.q, case.k_table, case.v_table, case.weight)
    ]
    out, lse = target_attention(
        *leaves[:3], case.rows, *case.bounds, leaves[3],
        normaliser=case.normaliser, activation=case.activation, q_chunk=case.q_chunk, return_lse=True, backend=backend,
    )  # fmt: skip
    return gradients(case, leaves, out, lse)


def gradients(case: Case, leaves: list[Any], out: Tensor, lse: Tensor | None) -> dict[str, Tensor]:
    loss = (out.double() * case.grads[0].to(out.device).double()).sum()
    if lse is not None:
        loss = loss + (lse.where(lse > -torch.inf, 0.0).double() * case.grads[1].to(lse.device).double()).sum()
    given = [x for x in leaves if x is not None]
    found = (
        iter(torch.autograd.grad(loss, given, allow_unused=True))
        if out.numel()
        else iter([torch.zeros_like(x) for x in given])
    )
    values = [
        out.detach(),
        None if lse is None else lse.detach(),
        *(None if x is None else next(found) for x in leaves),
    ]
    return {name: x for name, x in zip(NAMES, values, strict=True) if x is not None}


def oracle(case: Case) -> dict[str, Tensor]:
    """Query by query, head by head, over the keys that are there, in float64."""
    leaves = [
        None if x is None else x.detach().cpu().double().requires_grad_()
        for x in (case.q, case.k_table, case.v_table, case.weight)
    ]
    q, k_table, v_table, weight = leaves
    v_table = k_table if v_table is None else v_table
    share, scale, rows = q.shape[1] // k_table.shape[1], q.shape[2] ** -0.5, case.rows.cpu()
    outs, lses, i, first = [], [], 0, 0
    for n_q, n_k in zip(case.lengths_q, case.lengths_k, strict=True):
        for _ in range(n_q):
            for h in range(q.shape[1]):
                key = torch.arange(first, first + n_k)
                w = torch.full((n_k,), 0.0 if case.normaliser == "softmax" else 1.0, dtype=torch.float64)
                if weight is not None:
                    w = weight if case.q_chunk is None else weight[int(case.q_chunk[i])]
                    w = w[key] if w.dim() == 1 else w[key, h]
                if case.normaliser == "softmax":
                    key, w = key[w > -torch.inf], w[w > -torch.inf]
                s = scale * k_table[rows[key], h // share] @ q[i, h]
                v = v_table[rows[key], h // share]
                if case.normaliser == "softmax":
                    outs.append(torch.softmax(s + w, 0) @ v if len(key) else q[i, h] * 0)
                    lses.append(torch.logsumexp(s + w, 0) if len(key) else torch.tensor(-torch.inf).double())
                else:
                    outs.append((w * (s if case.activation is None else case.activation(s))) @ v)
            i += 1
        first += n_k
    out = torch.stack(outs).view(q.shape) if outs else torch.zeros_like(q)
    lse = None
    if case.normaliser == "softmax":
        lse = torch.stack(lses).view(q.shape[:2]) if lses else torch.zeros(q.shape[:2]).double()
    return {
        name: torch.zeros_like(like(case, name)).double() if x is None else x
        for name, x in gradients(case, leaves, out, lse).items()
    }


def like(case: Case, name: str) -> Tensor:
    return {"dq": case.q, "dk": case.k_table, "dv": case.v_table, "dweight": case.weight}[name].cpu()  # type: ignore[union-attr]


def check(case: Case, results: dict[str, Tensor] | None = None) -> None:
    results = run(case) if results is None else results
    expected = oracle(case)
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        got = results[name].detach().cpu().double()
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite), name
        error = (got[finite] - want[finite]).norm() / want[finite].norm().clamp(min=1e-6 * max(want.numel(), 1) ** 0.5)
        assert error <= TOLERANCE[case.q.dtype], f"{name}: {error:.2e}"


def supported(device: str) -> list[torch.dtype]:
    both = [torch.float32, torch.bfloat16]
    return both if device == "cuda" else [*both, torch.float64, torch.float16]
