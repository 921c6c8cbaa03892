"""flash-attn-4 (its own package): without weights as it is, with weights per key through its score_mod."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ta_plugin.attention.buckets import nothing_seen


@cache
def weight_modifiers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """score_mod and its backward that add aux_tensors[0] (K,) to the scores, in the package's own language."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def add(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        place = cute.make_rmem_tensor(1, cutlass.Int32)
        place.store(kv_idx + seqlen_info.offset_k)
        return score + utils.scalar_to_ssa(aux_tensors[0][place[0]], cutlass.Float32)

    @cute.jit
    def add_backward(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return grad

    return add, add_backward


def flash4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = False,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """The contract of `weighted_attention` for log_weight (K,) that needs no gradient, or None: out (Q, H, Dv), lse (Q, H)."""
    from flash_attn.cute import flash_attn_varlen_func

    if not (q.shape[0] and k.shape[0]):
        return nothing_seen(q, k, v, log_weight)
    options: dict[str, Any] = {}
    if log_weight is not None:
        log_weight = log_weight.detach().float().contiguous()
        gone = (log_weight == -torch.inf)[:, None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)  # 0 * NaN is NaN
        add, add_backward = weight_modifiers()
        options = {"score_mod": add, "score_mod_bwd": add_backward, "aux_tensors": [log_weight]}
    longest = torch.stack([cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max()]).tolist()
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        softmax_scale=scale,
        causal=causal,
        deterministic=deterministic,
        return_lse=True,
        **options,
    )
    return out, lse.transpose(0, 1)
