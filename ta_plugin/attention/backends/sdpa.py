"""torch's flash attention for the CPU, with what its public entry lacks: lse, and gradients through lse and the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The dense kernel of `over_buckets` on the CPU."""
    return _Flash.apply(q, k, v, weight, scale)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        mask = _mask(weight, q)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
        if weight is not None:
            keyless = (weight == -torch.inf).all(-1)[:, :, None].expand_as(lse)
            if keyless.any():
                out, lse = out.masked_fill(keyless.unsqueeze(-1), 0.0), lse.masked_fill(keyless, -torch.inf)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, weight, out, lse)
        return out.transpose(1, 2), lse.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, weight, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout.transpose(1, 2)
        dlse = None if dlse is None else dlse.transpose(1, 2)
        lse = lse.masked_fill(
            lse == -torch.inf, torch.inf
        )  # exp(score - inf) = 0: a query without keys passes nothing back
        mask = _mask(weight, q.transpose(1, 2))
        dim, weight_grad = q.shape[-1], weight is not None and ctx.needs_input_grad[3]
        extra = dlse is not None or weight_grad
        if extra:
            # The kernel forms dS = P * (dout.v - dout.out). One more column makes the bracket dout.v - (dout.out - dlse),
            # and a query column of ones against a key column of zeros collects the column sums of dS: d(log weight).
            q, k, v = _with_column(q, 1.0), _with_column(k, 0.0), _with_column(v, 0.0)
            out = _with_column(out, -1.0)
            dout = torch.cat(
                [dout, torch.zeros_like(lse)[..., None].to(dout) if dlse is None else dlse[..., None].to(dout)], -1
            )
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout.contiguous(), q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        dweight = None
        if weight_grad:
            dweight = dk[..., dim].to(weight.dtype) / ctx.scale
            dweight = dweight if weight.shape[1] > 1 else dweight.sum(1, keepdim=True)
            dweight = dweight.masked_fill(weight == -torch.inf, 0.0)
        dq, dk, dv = (x[..., :dim].transpose(1, 2) for x in (dq, dk, dv))
        return dq, dk, dv, dweight, None


def _mask(weight: Tensor | None, q: Tensor) -> Tensor | None:
    """weight (n, H or 1, Tk), float32 whatever q is, as the kernel's additive mask, broadcast without a copy."""
    if weight is None:
        return None
    n, tq, heads = q.shape[:3]
    return weight[:, :, None, :].expand(n, heads if weight.shape[1] > 1 else 1, tq, weight.shape[2])


def _with_column(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), value)], -1)
