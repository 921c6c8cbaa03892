"""The operator behind `attention.merge`: partial attention results into one. Kernels: csrc/cpu/merge.cpp and csrc/rows/merge.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ta_plugin.ops.registry import Operator


def _wide(outs: Tensor, lses: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32)


def _shares(lses: Tensor, lse: Tensor) -> Tensor:
    """exp(lse_n - lse), 0 for absent partials: (N, Q, H) against (Q, H)."""
    absent = lses == -torch.inf
    return (lses - lse.masked_fill(lse == -torch.inf, 0.0)).masked_fill(absent, -torch.inf).exp()


def _merge_in_torch(outs: Tensor, lses: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    wide = _wide(outs, lses)
    lses = lses.to(wide)
    peak = lses.amax(0)
    lse = peak + _shares(lses, peak).sum(0).log()  # all absent: -inf + log 0
    # what an absent partial holds must not matter, NaN included
    present = outs.to(wide).masked_fill((lses == -torch.inf).unsqueeze(-1), 0.0)
    return (_shares(lses, lse).unsqueeze(-1) * present).sum(0).to(dtype or outs.dtype), lse


def _merge_like(outs: Tensor, lses: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out = outs.new_empty(outs.shape[1:], dtype=dtype or outs.dtype)
    return out, lses.new_empty(lses.shape[1:], dtype=_wide(outs, lses))


def _gradient_in_torch(
    grad_out: Tensor, grad_lse: Tensor, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """d outs_n = share_n dout; d lse_n = share_n (dout . outs_n - sum_m share_m dout . outs_m + dlse)."""
    wide = _wide(outs, lses)
    share = _shares(lses.to(wide), lse.to(wide))
    grad_out, absent = grad_out.to(wide), lses == -torch.inf
    dots = (grad_out * outs.to(wide).masked_fill(absent.unsqueeze(-1), 0.0)).sum(-1)
    grad_lses = share * (dots - (share * dots).sum(0) + grad_lse.to(wide))
    grad_outs = share.unsqueeze(-1) * grad_out
    # masked, not only times 0: what arrives may be NaN where every partial is absent
    grad_outs, grad_lses = grad_outs.masked_fill(absent.unsqueeze(-1), 0.0), grad_lses.masked_fill(absent, 0.0)
    return grad_outs.to(outs.dtype), grad_lses.to(lses.dtype)


def _gradient_like(
    grad_out: Tensor, grad_lse: Tensor, outs: Tensor, lses: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(outs), torch.empty_like(lses)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
    # where this gradient will be differentiated, torch's own operators record it
    gradient = _gradient_in_torch if torch.is_grad_enabled() else MERGE_BACKWARD
    return *gradient(grad_out, grad_lse, *ctx.saved_tensors), None


MERGE = Operator(
    "merge",
    "(Tensor outs, Tensor lses, ScalarType? dtype) -> (Tensor, Tensor)",
    _merge_in_torch,
    _merge_like,
    _keep,
    _merge_backward,
)
MERGE_BACKWARD = Operator(
    "merge_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor outs, Tensor lses, Tensor lse) -> (Tensor, Tensor)",
    _gradient_in_torch,
    _gradient_like,
)


def _merge_into_in_torch(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    merged, merged_lse = _merge_in_torch(torch.stack([out, other]), torch.stack([lse, other_lse]), None)
    out.copy_(merged)
    lse.copy_(merged_lse)


MERGE_INTO = Operator(
    "merge_into",
    "(Tensor(a!) out, Tensor(b!) lse, Tensor other, Tensor other_lse) -> ()",
    _merge_into_in_torch,
    lambda out, lse, other, other_lse: None,
)


def merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """out (Q, H, D) and lse (Q, H) become the merge of themselves and one more partial, in place; without a gradient."""
    MERGE_INTO(out, lse, other, other_lse)


def merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """outs (N, Q, H, D), lses (N, Q, H) -> out (Q, H, D) in `dtype`, lse (Q, H); see `attention.merge`."""
    if outs.dim() != 4 or outs.shape[:3] != lses.shape:
        raise ValueError(
            f"outs is {tuple(outs.shape)} and lses {tuple(lses.shape)}; pass (N, Q, H, D) and (N, Q, H) of N partials"
        )
    if outs.shape[0] == 0:
        raise ValueError("outs holds no partials; pass at least one")
    result: tuple[Tensor, Tensor] = MERGE(outs, lses, dtype)
    return result
