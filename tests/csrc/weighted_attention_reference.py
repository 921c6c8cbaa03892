"""Weighted attention sample by sample in float64: what the CUDA kernel is held against."""

import torch


def reference(q, k, v, log_weight, lengths_q, lengths_k, scale):
    """q, k, v, log_weight in float64; returns out and lse, differentiable."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    if log_weight.dim() == 1:
        log_weight = log_weight[:, None].expand(-1, heads)
    outs, lses = [], []
    for qs, ks, vs, ws in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), log_weight.split(lengths_k), strict=False
    ):
        present = ws != -torch.inf
        # absent rows may hold NaN: they must not even be multiplied by 0
        some_head = present.reshape(len(ks), k.shape[1], group).any(-1)[..., None]
        ks, vs = ks.where(some_head, 0), vs.where(some_head, 0)
        ks, vs = ks.repeat_interleave(group, 1), vs.repeat_interleave(group, 1)
        # heads without any present key: computed on finite scores, then set to what the contract says
        empty = ~present.any(0)
        bias = ws.masked_fill(empty, 0).t()[:, None]
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * scale + bias
        lse = scores.logsumexp(-1)
        p = (scores - lse[..., None]).exp() if len(ks) else scores
        p = p.masked_fill(empty[:, None, None], 0)
        lse = lse.masked_fill(empty[:, None], -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", p, vs))
        lses.append(lse.t())
    return torch.cat(outs), torch.cat(lses)


def reference_gradients(q, k, v, log_weight, lengths_q, lengths_k, scale, dout, dlse):
    """out, lse, dq, dk, dv, dlog_weight in float64 from inputs of any type."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, log_weight)]
    out, lse = reference(*leaves, lengths_q, lengths_k, scale)
    finite = lse != -torch.inf
    loss = (out * dout.double()).sum() + (lse.where(finite, 0) * dlse.double()).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))
