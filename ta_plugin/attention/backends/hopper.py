"""Our sm_90a kernel (csrc/weighted_attention) as an autograd function: padding, strides, chunks and what it is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin.attention.buckets import nothing_seen
from ta_plugin.attention.merge import merge
from ta_plugin.attention.runs import Runs
from ta_plugin.ops.builder import LoadedExtension, load_extension

HEAD_DIMS = (64, 96, 128)  # what the kernel is compiled for
Grads = tuple[Tensor | None, ...]


@cache
def extension() -> LoadedExtension:
    """The extension, built on first use where a compiler is found (about a minute), or why there is none."""
    return load_extension("ta_weighted_attention")


def padded_dim(head_dim: int, value_dim: int) -> int | None:
    """The head_dim that the kernel computes a call with, or None where both are beyond it."""
    return next((d for d in HEAD_DIMS if d >= max(head_dim, value_dim)), None)


def hopper_attention(
    kernels: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = False,
    runs: Runs | None = None,
    k_visible: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """The contract of `weighted_attention` on `kernels`, a module with the functions of binding.cpp.

    Two things the kernel lacks are put together from what it has: runs that share rows of weights get a copy each (runs x keys
    numbers), and causal runs are what lies before each of them, seen whole, and each causal onto itself.
    """
    if runs is not None and not runs.chunks:
        return nothing_seen(q, k, v, log_weight)
    if runs is not None and not runs.ascending:
        rows = torch.tensor(runs.chunks, device=q.device)
        log_weight, k_visible = (None if x is None else x[rows] for x in (log_weight, k_visible))
        runs = runs.with_own_rows()
    if runs is not None and causal:
        return _causal_runs(
            kernels, q, k, v, log_weight, cu_seqlens_q, scale=scale, runs=runs, k_visible=k_visible, deterministic=deterministic
        )  # fmt: skip
    value_dim = v.shape[2]
    width = padded_dim(q.shape[2], value_dim)
    if width is None:
        raise ValueError(f"head_dim is {max(q.shape[2], value_dim)}; the kernel covers up to {HEAD_DIMS[-1]}")
    if scale <= 0:  # the kernel divides by it
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    q, k, v = (x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2])) for x in (q, k, v))
    if log_weight is not None:
        log_weight = log_weight.float()
        if 0 in log_weight.stride():  # gradients of expanded weights are sums, taken outside
            log_weight = log_weight.contiguous()
    call = _Call.of(cu_seqlens_q, cu_seqlens_k, scale, causal, runs, k_visible)
    out, lse = _Hopper.apply(kernels, q, k, v, log_weight, call, deterministic)
    return (out if value_dim == width else out[..., :value_dim]), lse


def _causal_runs(
    kernels: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens: Tensor,
    *,
    scale: float,
    runs: Runs,
    k_visible: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Ascending runs, causal: queries and keys lie alike, so a run's own keys are where its queries are."""
    device = q.device
    starts, samples, chunks = (torch.tensor(x, device=device) for x in (runs.bounds, runs.samples, runs.chunks))
    before = starts[:-1] - cu_seqlens.long()[samples]  # keys of its sample before each run
    length = starts.diff()
    # the weights of a run's own keys are its row's: one weight per key
    key = torch.arange(q.shape[0], device=device)
    row = chunks.repeat_interleave(length, output_size=q.shape[0])
    own = None if log_weight is None else log_weight[row, key]
    if k_visible is not None:
        place = key - (starts[:-1] - before).repeat_interleave(length, output_size=q.shape[0])
        hidden = place >= k_visible[row]
        own = torch.zeros(q.shape[0], dtype=torch.float32, device=device) if own is None else own
        own = own.masked_fill(hidden if own.dim() == 1 else hidden[:, None], -torch.inf)
    options: dict[str, Any] = {"scale": scale, "deterministic": deterministic}
    inside = hopper_attention(kernels, q, k, v, own, starts.int(), starts.int(), causal=True, **options)
    if len(set(runs.samples)) == len(runs.samples):  # nothing lies before any run
        return inside
    seen = torch.zeros(runs.num_chunks, dtype=torch.long, device=device).index_copy(0, chunks, before)
    seen = seen if k_visible is None else torch.minimum(seen, k_visible)
    prefix = hopper_attention(
        kernels, q, k, v, log_weight, cu_seqlens, cu_seqlens, runs=runs, k_visible=seen, **options
    )
    return merge(torch.stack([prefix[0], inside[0]]), torch.stack([prefix[1], inside[1]]))


@dataclass(frozen=True)
class _Call:
    """The kernel's arguments beside the rows: with chunks, cu_seqlens_q bounds chunks and cu_chunks each sample's chunks."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    scale: float
    causal: bool
    cu_chunks: Tensor | None
    k_visible: Tensor | None

    @classmethod
    def of(
        cls,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        scale: float,
        causal: bool,
        runs: Runs | None,
        k_visible: Tensor | None,
    ) -> _Call:
        cu_k = cu_seqlens_k.int().contiguous()
        if runs is None:
            return cls(cu_seqlens_q.int().contiguous(), cu_k, scale, causal, None, None)
        queries, chunks = (
            torch.tensor(x, dtype=torch.int32).to(cu_k.device) for x in runs.cu_chunks(cu_k.shape[0] - 1)
        )
        visible = None if k_visible is None else k_visible.int().clamp(min=0).contiguous()
        return cls(queries, cu_k, scale, causal, chunks, visible)

    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "cu_chunks": self.cu_chunks, "k_visible": self.k_visible}


class _Hopper(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_weight: Tensor | None,
        call: _Call,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x) for x in (q, k, v))
        bounds = (call.cu_seqlens_q, call.cu_seqlens_k)
        out, lse = kernels.forward(q, k, v, log_weight, *bounds, call.scale, **call.options())
        ctx.kernels, ctx.call, ctx.deterministic = kernels, call, deterministic
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, log_weight, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Grads:
        if dout is None and dlse is None:
            return (None,) * 7
        q, k, v, log_weight, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else aligned(dout)
        dlse = None if dlse is None else dlse.float().contiguous()
        need_dweight = log_weight is not None and ctx.needs_input_grad[4]
        dq, dk, dv, dweight = ctx.kernels.backward(
            dout,
            dlse,
            q,
            k,
            v,
            log_weight,
            out,
            lse,
            ctx.call.cu_seqlens_q,
            ctx.call.cu_seqlens_k,
            ctx.call.scale,
            need_dweight,
            ctx.deterministic,
            **ctx.call.options(),
        )
        return None, dq, dk, dv, dweight if need_dweight else None, None, None


def aligned(x: Tensor) -> Tensor:
    """x, copied unless its rows are contiguous and start at multiples of 16 bytes, as the copy engine needs."""
    fits = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits or x.numel() == 0 else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
