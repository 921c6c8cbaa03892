"""The kernel contract: packed variable-length softmax attention with a log weight per key (DESIGN section 6)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ta_plugin.attention.backends import Machine, choose
from ta_plugin.attention.dense import dense_attention
from ta_plugin.attention.runs import Runs


@overload
def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    q_chunk: Tensor | None = ...,
    k_visible: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = ...,
    causal: bool = ...,
    q_chunk: Tensor | None = ...,
    k_visible: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    q_chunk: Tensor | None = None,
    k_visible: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out[i] = sum_u softmax_u(scale * q_i.k_u + w_u) v_u over the keys of i's sample; optionally lse[i] with it.

    q:            (Q, H, D) packed queries, bf16, fp16 or fp32 (softmax in fp32), or float64 (float64 throughout)
    k, v:         (K, Hk, D), (K, Hk, Dv) packed distinct rows; Hk divides H (grouped-query attention)
    log_weight:   (K,) or (K, H) floating, at least float32; with q_chunk (C, K) or (C, K, H). -inf: the key is absent.
                  None: all weights 0, and nothing is added
    cu_seqlens_*: (B + 1,) int32, bounds of each sample
    scale:        D ** -0.5 by default
    causal:       query i of a sample sees its keys 0 .. i (both sides of equal length)
    q_chunk:      (Q,) int, the row of log_weight that each query uses
    k_visible:    (C,) int32, with q_chunk: how many of its sample's keys a chunk sees, from the first
    deterministic: whether backward repeats bit for bit, as every other part of a step does. False lets "hopper" and "flash4" add dq in
                  the order blocks finish, which is faster; torch.use_deterministic_algorithms(True) overrides it
    backend:      "reference", "sdpa" (CPU), "flex" (CUDA), "hopper" (our kernel, sm_90), "flash4" (flash-attn-4), or None to have
                  one chosen

    Returns out (Q, H, Dv) in v's dtype, and with return_lse lse (Q, H) in float32 (float64 for float64), natural log, weights
    included. A query without keys gives 0, lse -inf and gradient 0. Gradients flow to q, k, v and log_weight, through out
    and lse. Raises ValueError for shapes that disagree or a backend that does not cover the call.
    """
    _check(q, k, v, log_weight, cu_seqlens_q, cu_seqlens_k, q_chunk, k_visible, causal)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    runs = None
    if q_chunk is not None and (log_weight is not None or k_visible is not None):
        num_chunks = log_weight.shape[0] if log_weight is not None else k_visible.shape[0]  # type: ignore[union-attr]
        runs = Runs.of(q_chunk, num_chunks, cu_seqlens_q)
    choice = choose(
        backend,
        device=Machine.of(q.device),
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        per_query_weights=runs is not None,
        causal=causal,
        runs=runs,
        weighted=log_weight is not None,
        per_head=log_weight is not None and log_weight.dim() == (3 if runs is not None else 2),
        deterministic=deterministic,
        weight_grad=log_weight is not None and log_weight.requires_grad and torch.is_grad_enabled(),
        keys_per_sample=k.shape[0] // max(cu_seqlens_k.numel() - 1, 1),
    )
    bounds = (cu_seqlens_q, cu_seqlens_k)
    if choice.name == "reference":
        out, dense_lse = dense_attention(
            q, k, v, log_weight, *bounds,
            scale=scale, causal=causal, q_chunk=None if runs is None else q_chunk, k_visible=k_visible,
        )  # fmt: skip
        assert dense_lse is not None
        lse = dense_lse
    elif choice.name == "sdpa":
        from ta_plugin.attention.backends.sdpa import sdpa_attention

        out, lse = sdpa_attention(
            q, k, v, log_weight, *bounds, scale=scale, causal=causal, runs=runs, k_visible=k_visible
        )  # fmt: skip
    elif choice.name == "hopper":
        from ta_plugin.attention.backends.hopper import extension, hopper_attention

        out, lse = hopper_attention(
            extension().kernels, q, k, v, log_weight, *bounds,
            scale=scale, causal=causal, runs=runs, k_visible=k_visible, deterministic=deterministic,
        )  # fmt: skip
    elif choice.name == "flash4":
        from ta_plugin.attention.backends.flash4 import flash4_attention

        out, lse = flash4_attention(
            q, k, v, log_weight, *bounds, scale=scale, causal=causal, deterministic=deterministic
        )  # fmt: skip
    else:
        from ta_plugin.attention.backends.flex import flex_attention_of

        out, lse = flex_attention_of(q, k, v, log_weight, *bounds, scale=scale, causal=causal)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_chunk: Tensor | None,
    k_visible: Tensor | None,
    causal: bool,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}; pass floating packed rows (rows, heads, head_dim)"
            )
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; q and k share head_dim, k and v rows and heads"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {k.shape[1]}; the second must divide the first")
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_q bounds {cu_seqlens_q.numel() - 1} samples, cu_seqlens_k {cu_seqlens_k.numel() - 1}; pass the same samples"
        )
    for name, bounds, rows in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        if not bounds.is_cuda and int(bounds[-1]) != rows:  # on a GPU reading it would wait for the device
            raise ValueError(
                f"{name} ends at {int(bounds[-1])}, but there are {rows} rows; bounds rise from 0 to all rows"
            )
    if log_weight is not None:
        keys = log_weight.shape[1:] if q_chunk is not None else log_weight.shape
        if tuple(keys) not in ((k.shape[0],), (k.shape[0], q.shape[1])):
            chunks = "(C, K) or (C, K, H)" if q_chunk is not None else "(K,) or (K, H)"
            raise ValueError(
                f"log_weight has shape {tuple(log_weight.shape)}; pass {chunks}, K = {k.shape[0]}, H = {q.shape[1]}"
            )
        if log_weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"log_weight is {log_weight.dtype}; pass float32, since bf16 cannot tell counts above 256 apart"
            )
    if q_chunk is not None and q_chunk.shape != q.shape[:1]:
        raise ValueError(f"q_chunk has shape {tuple(q_chunk.shape)}; pass one chunk per query, ({q.shape[0]},)")
    if k_visible is not None and q_chunk is None:
        raise ValueError("k_visible is given without q_chunk; pass the chunk of each query too")
    if k_visible is not None and log_weight is not None and k_visible.shape != log_weight.shape[:1]:
        raise ValueError(
            f"k_visible has shape {tuple(k_visible.shape)}; pass one number per chunk, ({log_weight.shape[0]},)"
        )
    # the same tensor needs no look at the device
    if causal and cu_seqlens_q is not cu_seqlens_k and not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError("causal is set, but cu_seqlens_q and cu_seqlens_k differ; pass a chunk against itself")
