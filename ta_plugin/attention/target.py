"""The contract of target attention: few queries per sample onto rows gathered by index (DESIGN section 6)."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin.attention.backends import BackendChoice
from ta_plugin.attention.dense import Activation, Normaliser, dense_attention
from ta_plugin.attention.weighted import weighted_attention
from ta_plugin.ops import Segments, expand
from ta_plugin.ops.registry import define, is_compiled, load_kernel
from ta_plugin.ops.target import TARGET_ATTENTION, RowsInPlace, attend

_WIDE_BYTES = 164 << 10  # of shared memory, a little less than backward of more than 128 float32 columns takes


@overload
def target_attention(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor | Segments | RowsInPlace,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None = ...,
    *,
    scale: float | None = ...,
    normaliser: Normaliser = ...,
    activation: Activation | None = ...,
    q_chunk: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def target_attention(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor | Segments | RowsInPlace,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None = ...,
    *,
    scale: float | None = ...,
    normaliser: Normaliser = ...,
    activation: Activation | None = ...,
    q_chunk: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor | None]: ...


def target_attention(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor | Segments | RowsInPlace,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float | None = None,
    normaliser: Normaliser = "softmax",
    activation: Activation | None = None,
    q_chunk: Tensor | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """Attention of each sample's queries onto the table rows its keys name; samples that share tokens share those rows.

    With k_u = k_table[rows[u]], v_u = v_table[rows[u]] and s_iu = scale * q_i.k_u, over the keys u of query i's sample:
    softmax: out[i] = sum_u softmax_u(s_iu + w_iu) v_u, lse[i] the log of the denominator (natural, weights included);
    "none":  out[i] = sum_u w_iu activation(s_iu) v_u, and there is no lse.

    q:            (Q, H, D) packed queries, bf16, fp16 or fp32 (sums in fp32), or float64 (float64 throughout)
    k_table:      (G, Hk, D) distinct rows, in q's dtype; Hk divides H. Absorbed projections: (G, 1, E), with queries (Q, H, E)
    v_table:      (G, Hk, Dv), or None: the values are the keys, and every row is read once
    rows:         (K,) int64, the table row of each key of each sample, samples one after another; or their Segments, which spares
                  backward a sort; or RowsInPlace of a table outside of the graph, which is then the only one, backend "compiled"
    cu_seqlens_*: (B + 1,) int32, bounds of each sample among the queries and the keys
    weight:       log weights (softmax; -inf: the key is absent) or multipliers ("none"), (K,) or (K, H), at least float32;
                  with q_chunk (C, K) or (C, K, H): targets with cutoffs. None: log weight 0, multiplier 1
    scale:        D ** -0.5 by default
    activation:   of "none"; the identity by default
    q_chunk:      (Q,) integer, the row of `weight` that each query uses
    max_seqlen_q: no sample has more queries; None reads it from the device, which waits for it
    backend:      "compiled" (csrc/: CUDA bf16 and fp32, CPU every dtype; activation None or SiLU), "expanded" (rows written out per
                  key, then `weighted_attention` or `dense_attention`), or None: compiled where that covers the call and is there

    Returns out (Q, H, Dv) in q's dtype, and with return_lse lse (Q, H) float32 (float64 for float64), None for "none". A query
    without keys gives 0, lse -inf and gradient 0. A NaN row reaches only the samples that name it, and none where it is absent.
    Gradients flow to q, the tables (once per distinct row, in a fixed order: bitwise repeatable) and weight, through out and lse.
    Raises ValueError for shapes that disagree or a backend that does not cover the call.
    """
    _check(q, k_table, v_table, rows, cu_seqlens_q, cu_seqlens_k, weight, q_chunk, normaliser, activation)
    segments = Segments.from_index(rows, k_table.shape[0]) if isinstance(rows, Tensor) else rows
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if weight is not None:
        weight = weight.to(torch.promote_types(q.dtype, torch.float32))
    choice = choose_target(backend, q, k_table, v_table, activation)
    lse: Tensor | None
    if choice.name == "compiled":
        if max_seqlen_q is None:
            max_seqlen_q = int(cu_seqlens_q.diff().max()) if cu_seqlens_q.numel() > 1 else 0
        out, total = attend(
            q, k_table, v_table, segments, cu_seqlens_q, cu_seqlens_k, weight,
            None if q_chunk is None else q_chunk.long(), min(max_seqlen_q, q.shape[0]), scale,
            "silu" if _is_silu(activation) else normaliser,
        )  # fmt: skip
        lse = total if normaliser == "softmax" else None
    elif isinstance(segments, RowsInPlace):
        raise ValueError(
            f"rows are read in place by backend 'compiled', not {choice.name!r} ({choice.reason}); pass Segments"
        )
    else:
        k = expand(k_table, segments)
        v = k if v_table is None else expand(v_table, segments)
        if normaliser == "softmax":
            out, lse = weighted_attention(
                q, k, v, weight, cu_seqlens_q, cu_seqlens_k, scale=scale, q_chunk=q_chunk, return_lse=True
            )
        else:
            out, lse = dense_attention(
                q, k, v, weight, cu_seqlens_q, cu_seqlens_k,
                scale=scale, activation=activation, normaliser="none", q_chunk=q_chunk,
            )  # fmt: skip
    return (out, lse) if return_lse else out


def choose_target(
    requested: str | None, q: Tensor, k_table: Tensor, v_table: Tensor | None, activation: Activation | None
) -> BackendChoice:
    """The requested backend of `target_attention` if it covers the call, else an error; by default the kernel if it is there."""
    if requested not in (None, "compiled", "expanded"):
        raise ValueError(f"backend is {requested!r}; choose 'compiled', 'expanded', or None")
    if requested == "expanded":
        return BackendChoice("expanded", "as requested")
    limit = _limit(q, k_table, v_table, activation) or _not_ready(q.device.type)
    if limit is None:
        return BackendChoice("compiled", "reads each row once per sample, without writing it out")
    if requested is not None:
        raise ValueError(f"backend 'compiled' {limit}; pass backend=None to have one chosen that does")
    return BackendChoice("expanded", f"compiled {limit}")


def _limit(q: Tensor, k_table: Tensor, v_table: Tensor | None, activation: Activation | None) -> str | None:
    """What the kernels do not cover, or None."""
    width, limit = q.shape[2], 256 if q.dtype == torch.bfloat16 or v_table is None else 128
    if v_table is not None and v_table.shape != k_table.shape:
        return "needs equal head dims for keys and values"
    if activation is not None and not _is_silu(activation):
        return "has no activation but SiLU"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"runs on the CPU and on CUDA, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float32):
        return f"runs bfloat16 and float32 on CUDA, not {q.dtype}"
    if q.dtype == torch.float32 and width > 128:
        has = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", _WIDE_BYTES)
        limit = limit if has >= _WIDE_BYTES else 128
    if width * q.element_size() % 16 or not 0 < width <= limit:
        return f"needs rows of whole 16 bytes and at most {limit} elements on CUDA, not {width} of {q.dtype}"
    return None


def _not_ready(device: str) -> str | None:
    """Why the kernels cannot run on a device, or None. On the CPU nothing is compiled for a call."""
    if device in TARGET_ATTENTION.ready:
        return None
    define(TARGET_ATTENTION)
    if is_compiled(TARGET_ATTENTION.name, device):
        return None
    return "is not built; load_op('target_attention') builds it" if device == "cpu" else _build(device)


@cache  # one try per process
def _build(device: str) -> str | None:
    reason = load_kernel(TARGET_ATTENTION.name, device)
    if reason is None:
        return None
    warnings.warn(f"target_attention writes out a row per key: {reason}", stacklevel=5)
    return f"cannot be built: {reason}"


def _is_silu(activation: Activation | None) -> bool:
    return activation is F.silu or isinstance(activation, nn.SiLU)


def _check(
    q: Tensor,
    k_table: Tensor,
    v_table: Tensor | None,
    rows: Tensor | Segments | RowsInPlace,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    weight: Tensor | None,
    q_chunk: Tensor | None,
    normaliser: str,
    activation: Activation | None,
) -> None:
    if q.dim() != 3 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} of shape {tuple(q.shape)}; pass floating packed queries (Q, H, D)")
    if k_table.dim() != 3 or k_table.shape[2] != q.shape[2]:
        raise ValueError(f"k_table has shape {tuple(k_table.shape)}; pass (G, Hk, D) with q's D, {q.shape[2]}")
    if any(t is not None and t.dtype != q.dtype for t in (k_table, v_table)):
        found = f"q is {q.dtype}, k_table {k_table.dtype}" + ("" if v_table is None else f", v_table {v_table.dtype}")
        raise ValueError(f"{found}; cast them to one dtype")
    if v_table is not None and v_table.shape[:2] != k_table.shape[:2]:
        raise ValueError(
            f"v_table has shape {tuple(v_table.shape)}; pass k_table's rows and heads, {tuple(k_table.shape[:2])}"
        )
    if k_table.shape[1] == 0 or q.shape[1] % k_table.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k_table {k_table.shape[1]}; the second must divide the first")
    if isinstance(rows, RowsInPlace):
        if v_table is not None:
            raise ValueError("v_table is given with rows in place; pass Segments, or one table")
    elif isinstance(rows, Segments):
        if rows.num_segments != k_table.shape[0]:
            raise ValueError(f"rows map onto {rows.num_segments} table rows, but k_table has {k_table.shape[0]}")
    elif rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; pass int64 (K,) or Segments")
    keys = rows.shape[0] if isinstance(rows, Tensor) else rows.num_members
    if cu_seqlens_q.numel() != cu_seqlens_k.numel():
        raise ValueError(
            f"cu_seqlens_q bounds {cu_seqlens_q.numel() - 1} samples, cu_seqlens_k {cu_seqlens_k.numel() - 1}; pass the same samples"
        )
    if normaliser not in ("softmax", "none"):
        raise ValueError(f"normaliser is {normaliser!r}; choose 'softmax' or 'none'")
    if normaliser == "softmax" and activation is not None:
        raise ValueError("activation is given with normaliser='softmax', which has none; pass normaliser='none'")
    if q_chunk is not None and q_chunk.shape != q.shape[:1]:
        raise ValueError(f"q_chunk has shape {tuple(q_chunk.shape)}; pass one row of weight per query, ({q.shape[0]},)")
    if weight is not None:
        shape = tuple(weight.shape[1:] if q_chunk is not None else weight.shape)
        if shape not in ((keys,), (keys, q.shape[1])) or not weight.is_floating_point():
            wanted = "(C, K) or (C, K, H)" if q_chunk is not None else "(K,) or (K, H)"
            raise ValueError(f"weight has shape {tuple(weight.shape)}; pass {wanted}, K = {keys}, H = {q.shape[1]}")
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"weight is {weight.dtype}; pass float32, since bf16 cannot tell counts above 256 apart")
