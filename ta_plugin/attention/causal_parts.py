"""One group of chunks of causal attention: what lies before each chunk and the chunk itself, forward and backward.

`ContractParts` goes through `weighted_attention`, on any backend, and computes a group once more in backward. `KernelParts` calls a kernel
whose backward takes out and lse: given those of the merged whole it returns each part's share of the gradients, and nothing is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ta_plugin.attention.backends.hopper import HEAD_DIMS, aligned, extension
from ta_plugin.attention.chunks import CausalChunks, Group
from ta_plugin.attention.merge import merge
from ta_plugin.attention.weighted import weighted_attention
from ta_plugin.ops import merge_into


@dataclass(frozen=True)
class Part:
    """A group with the prefix weights of its chunks and the biases within them.

    weights:    (chunks, rows) or (chunks, rows, H), None without anything before; derivative: of them by the decay, where asked
    bias, ages: (queries, H) and (queries,), None without decay
    """

    chunks: CausalChunks
    group: Group
    weights: Tensor | None
    derivative: Tensor | None
    bias: Tensor | None
    ages: Tensor | None


@dataclass(frozen=True)
class Rows:
    """A group's queries, the keys and values at their positions, and the rows k, v that may lie before; these None where nothing does."""

    q: Tensor
    keys: Tensor
    values: Tensor
    k: Tensor | None
    v: Tensor | None

    @classmethod
    def of(cls, part: Part, q: Tensor, k: Tensor, v: Tensor) -> Rows:
        chunks, group = part.chunks, part.group
        before = (None, None) if part.weights is None else (k[group.rows], v[group.rows])
        return cls(q[group.queries], chunks.spread(k, group), chunks.spread(v, group), *before)


@dataclass(frozen=True)
class Gradients:
    """Of `Rows` but q, and where asked of a part's bias and weights."""

    keys: Tensor
    values: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class ContractParts:
    """Through `weighted_attention`."""

    scale: float
    backend: str | None
    deterministic: bool
    reads_results = False

    def rows(self, x: Tensor) -> Tensor:
        """As the calls take q, k, v and their gradients."""
        return x

    def forward(self, rows: Rows, part: Part, out: Tensor, lse: Tensor) -> None:
        """Writes out (queries, H, Dv) and lse (queries, H) of a group, without the queries' own terms."""
        found = self._attend(rows, part)
        out.copy_(found[0])
        lse.copy_(found[1])

    def _attend(self, rows: Rows, part: Part) -> tuple[Tensor, Tensor]:
        group, at = part.group, part.chunks.index_of(part.group)
        options: Any = {"scale": self.scale, "backend": self.backend, "deterministic": self.deterministic}
        inside = weighted_attention(
            rows.q,
            rows.keys,
            rows.values,
            part.bias,
            at.cu_chunks,
            at.cu_chunks,
            causal=True,
            return_lse=True,
            **options,
        )
        if rows.k is None or rows.v is None:
            return inside
        before = weighted_attention(
            rows.q,
            rows.k,
            rows.v,
            part.weights,
            at.cu_queries,
            at.cu_rows,
            q_chunk=at.chunk.int(),
            k_visible=part.chunks.before.visible[group.first : group.last],
            return_lse=True,
            **options,
        )
        return merge(torch.stack([before[0], inside[0]]), torch.stack([before[1], inside[1]]))

    def backward(self, outer: list[Tensor | None], rows: Rows, part: Part, of_weights: bool, dq: Tensor) -> Gradients:
        """outer: dout and dlse of the group, None for zeros. Writes dq of the group."""
        held = {name: getattr(rows, name) for name in ("q", "keys", "values", "k", "v")}
        held = {name: x.detach().requires_grad_() for name, x in held.items() if x is not None}
        again = Part(part.chunks, part.group, part.weights, None, part.bias, None)
        leaves = dict(held)
        if of_weights:
            sides = {"bias": part.bias, "weights": part.weights}
            found = {name: x.detach().requires_grad_() for name, x in sides.items() if x is not None}
            again = Part(part.chunks, part.group, found.get("weights"), None, found["bias"], None)
            leaves |= found
        with torch.enable_grad():
            results = self._attend(Rows(**{"k": None, "v": None, **held}), again)
        used = [(x, g) for x, g in zip(results, outer, strict=True) if g is not None]
        grads = torch.autograd.grad(
            [x for x, _ in used],
            list(leaves.values()),
            [g for _, g in used],
            allow_unused=True,
            materialize_grads=True,
        )
        of = dict(zip(leaves, grads, strict=True))
        dq.copy_(of.pop("q"))
        return Gradients(**of)


@dataclass(frozen=True)
class KernelParts:
    """Through a module with the functions of csrc/weighted_attention/binding.cpp."""

    scale: float
    kernels: Any
    deterministic: bool
    reads_results = True

    def rows(self, x: Tensor) -> Tensor:
        """As `ContractParts.rows`."""
        return aligned(x)

    def forward(self, rows: Rows, part: Part, out: Tensor, lse: Tensor) -> None:
        """As `ContractParts.forward`."""
        inside, before = self._calls(rows, part)
        self.kernels.forward(*inside.positional, self.scale, **inside.options, out=out, lse=lse)
        if before is not None:
            merge_into(out, lse, *self.kernels.forward(*before.positional, self.scale, **before.options))

    def backward(self, outer: list[Tensor | None], rows: Rows, part: Part, of_weights: bool, dq: Tensor) -> Gradients:
        """outer: dout, dlse, out and lse of the group, the latter with the queries' own terms. Writes dq of the group."""
        dout, dlse, out, lse = outer
        assert out is not None and lse is not None
        # exp(score + weight - lse) is a key's share of the whole, whichever part it is in
        lse = lse if part.bias is None else lse + part.bias
        dout = torch.zeros_like(out) if dout is None else dout
        dlse = None if dlse is None else dlse.to(lse.dtype).contiguous()

        def of(call: _Call, **written: Tensor) -> Any:
            q, k, v, weight, *bounds = call.positional
            need = of_weights and weight is not None
            results = (dout, dlse, q, k, v, weight, out, lse, *bounds)
            return self.kernels.backward(*results, self.scale, need, self.deterministic, **call.options, **written)

        inside, before = self._calls(rows, part)
        _, dkeys, dvalues, dbias = of(inside, dq=dq)
        if before is None:
            return Gradients(dkeys, dvalues, bias=dbias)
        dq_before, dk, dv, dweights = of(before)
        dq += dq_before
        return Gradients(dkeys, dvalues, dk, dv, dbias, dweights)

    def _calls(self, rows: Rows, part: Part) -> tuple[_Call, _Call | None]:
        """Of the chunks themselves and of what lies before, None for the latter where nothing does."""
        chunks, group, at = part.chunks, part.group, part.chunks.index_of(part.group)
        inside = _Call((rows.q, rows.keys, rows.values, part.bias, at.cu_chunks, at.cu_chunks), {"causal": True})
        if rows.k is None:
            return inside, None
        options = {"cu_chunks": at.chunks_of_samples, "k_visible": chunks.before.visible[group.first : group.last]}
        return inside, _Call((rows.q, rows.k, rows.v, part.weights, at.cu_chunks, at.cu_rows), options)


@dataclass(frozen=True)
class _Call:
    """q, k, v, weights and bounds of queries and keys; and the options of one call of the kernel."""

    positional: tuple[Tensor | None, ...]
    options: dict[str, Any]


def parts_for(
    q: Tensor, v: Tensor, scale: float, backend: str | None, deterministic: bool
) -> ContractParts | KernelParts:
    """Our Hopper kernel where it covers the call and no other backend is asked for; the contract otherwise."""
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    covered = (
        backend in (None, "hopper")
        and q.is_cuda
        and scale > 0
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] == v.shape[2]
        and q.shape[2] in HEAD_DIMS
        and torch.cuda.get_device_capability(q.device) == (9, 0)
    )
    kernels = extension().kernels if covered else None
    if kernels is not None:
        return KernelParts(scale, kernels, deterministic)
    return ContractParts(scale, backend, deterministic)
