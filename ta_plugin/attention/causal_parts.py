"""One group of chunks of causal attention: what lies before each chunk and the chunk itself, forward and backward.

`ContractParts` goes through `weighted_attention`, on any backend, and computes a group once more in backward. `KernelParts` calls a kernel
whose backward takes out and lse: given those of the merged whole it returns each part's share of the gradients, and nothing is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ta_plugin.attention.chunks import CausalChunks, Group
from ta_plugin.attention.merge import merge
from ta_plugin.attention.weighted import weighted_attention


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
        group = part.group
        at = part.chunks.space.inverse[group.queries]
        before = (None, None) if part.weights is None else (k[group.rows], v[group.rows])
        return cls(q[group.queries], k[at], v[at], *before)


@dataclass(frozen=True)
class Gradients:
    """Of `Rows`, and where asked of a part's bias and weights."""

    q: Tensor
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
    reads_results = False

    def forward(self, rows: Rows, part: Part) -> tuple[Tensor, Tensor]:
        """out (queries, H, Dv) and lse (queries, H) of a group, without the queries' own terms."""
        chunks, group = part.chunks, part.group
        cu_q, cu_k, cu_chunks = chunks.bounds_of(group)
        inside = weighted_attention(
            rows.q,
            rows.keys,
            rows.values,
            part.bias,
            cu_chunks,
            cu_chunks,
            scale=self.scale,
            causal=True,
            return_lse=True,
            backend=self.backend,
        )
        if rows.k is None or rows.v is None:
            return inside
        before = weighted_attention(
            rows.q,
            rows.k,
            rows.v,
            part.weights,
            cu_q,
            cu_k,
            scale=self.scale,
            q_chunk=chunks.chunk_of(group),
            k_visible=chunks.visible[group.first : group.last],
            return_lse=True,
            backend=self.backend,
        )
        return merge(torch.stack([before[0], inside[0]]), torch.stack([before[1], inside[1]]))

    def backward(self, outer: list[Tensor | None], rows: Rows, part: Part, of_weights: bool) -> Gradients:
        """outer: dout and dlse of the group, None for zeros."""
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
            results = self.forward(Rows(**{"k": None, "v": None, **held}), again)
        used = [(x, g) for x, g in zip(results, outer, strict=True) if g is not None]
        grads = torch.autograd.grad(
            [x for x, _ in used],
            list(leaves.values()),
            [g for _, g in used],
            allow_unused=True,
            materialize_grads=True,
        )
        return Gradients(**dict(zip(leaves, grads, strict=True)))


@dataclass(frozen=True)
class KernelParts:
    """Through a module with the functions of csrc/weighted_attention/binding.cpp."""

    scale: float
    kernels: Any
    deterministic: bool
    reads_results = True

    def forward(self, rows: Rows, part: Part) -> tuple[Tensor, Tensor]:
        """As `ContractParts.forward`."""
        inside, before = (None if call is None else self._forward(*call) for call in self._calls(rows, part))
        assert inside is not None
        return inside if before is None else _joined(inside, before)

    def _forward(
        self, rows: tuple[Tensor, ...], weight: Tensor | None, bounds: tuple[Tensor, Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.forward(*rows, weight, *bounds, self.scale, **options)

    def backward(self, outer: list[Tensor | None], rows: Rows, part: Part, of_weights: bool) -> Gradients:
        """outer: dout, dlse, out and lse of the group, the latter with the queries' own terms."""
        dout, dlse, out, lse = outer
        assert out is not None and lse is not None
        # exp(score + weight - lse) is a key's share of the whole, whichever part it is in
        lse = lse if part.bias is None else lse + part.bias
        dout = torch.zeros_like(out) if dout is None else dout.to(out.dtype).contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        found = []
        for call in self._calls(rows, part):
            if call is None:
                continue
            rows_of, weight, bounds, options = call
            need = of_weights and weight is not None
            found.append(
                self.kernels.backward(
                    dout,
                    dlse,
                    *rows_of,
                    weight,
                    out,
                    lse.contiguous(),
                    *bounds,
                    self.scale,
                    need,
                    self.deterministic,
                    **options,
                )
            )
        dq, dkeys, dvalues, dbias = found[0]
        if len(found) == 1:
            return Gradients(dq, dkeys, dvalues, bias=dbias)
        of_before = found[1]
        return Gradients(dq + of_before[0], dkeys, dvalues, of_before[1], of_before[2], dbias, of_before[3])

    def _calls(self, rows: Rows, part: Part) -> list[Any]:
        """(rows, weight, bounds, options) of the chunks themselves and of what lies before, None for the latter where nothing does."""
        chunks, group = part.chunks, part.group
        _, cu_k, cu_chunks = chunks.bounds_of(group)
        inside = ((rows.q, rows.keys, rows.values), part.bias, (cu_chunks, cu_chunks), {"causal": True})
        if rows.k is None:
            return [inside, None]
        options = {
            "cu_chunks": chunks.chunks_of_samples(group),
            "k_visible": chunks.visible[group.first : group.last],
        }
        return [inside, ((rows.q, rows.k, rows.v), part.weights, (cu_chunks, cu_k), options)]


def _joined(inside: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`merge` of two partials, the first of which has keys for every query: half the traffic, no copy of both and no mask."""
    share = torch.sigmoid(before[1] - inside[1])  # of what lies before, 0 where nothing does
    out = inside[0] * (1 - share).unsqueeze(-1)
    out.addcmul_(before[0], share.unsqueeze(-1))
    return out, torch.logaddexp(inside[1], before[1])


def parts_for(q: Tensor, v: Tensor, scale: float, backend: str | None) -> ContractParts | KernelParts:
    """Our Hopper kernel where it covers the call and no other backend is asked for; the contract otherwise."""
    if backend in (None, "hopper") and q.is_cuda and scale > 0 and q.dtype in (torch.bfloat16, torch.float16):
        from ta_plugin.attention.backends.hopper import HEAD_DIMS, extension

        if (
            q.shape[2] == v.shape[2]
            and q.shape[2] in HEAD_DIMS
            and torch.cuda.get_device_capability(q.device) == (9, 0)
        ):
            found = extension()
            if found.kernels is not None:
                return KernelParts(scale, found.kernels, torch.are_deterministic_algorithms_enabled())
    return ContractParts(scale, backend)
