"""Weighted attention sample by sample in float64: what the CUDA kernel is held against."""

import torch


def reference(q, k, v, log_weight, lengths_q, lengths_k, scale, causal=False, cu_chunks=None, k_visible=None):
    """q, k, v, log_weight in float64; returns out and lse, differentiable. With cu_chunks lengths_q are the chunks'."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    chunks = torch.arange(len(lengths_k) + 1) if cu_chunks is None else cu_chunks
    if cu_chunks is None:
        log_weight = log_weight[None].expand(len(lengths_q), *log_weight.shape)
    if log_weight.dim() == 2:
        log_weight = log_weight[..., None].expand(-1, -1, heads)
    outs, lses = [], []
    queries, keys, values = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
    for sample in range(len(lengths_k)):
        for chunk in range(int(chunks[sample]), int(chunks[sample + 1])):
            qs, ks, vs = queries[chunk], keys[sample], values[sample]
            ws = log_weight[chunk].split(lengths_k)[sample]
            if k_visible is not None:
                seen = int(k_visible[chunk])
                ks, vs, ws = ks[:seen], vs[:seen], ws[:seen]
            out, lse = attend(qs, ks, vs, ws, group, scale, causal)
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def attend(q, k, v, log_weight, group, scale, causal):
    """One chunk of queries on the keys it sees; log_weight (keys, heads)."""
    present = log_weight != -torch.inf
    # absent rows may hold NaN: they must not even be multiplied by 0
    some_head = present.reshape(len(k), k.shape[1], group).any(-1)[..., None]
    k, v = k.where(some_head, 0), v.where(some_head, 0)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = present.t()[:, None].expand(-1, len(q), -1)  # (heads, queries, keys)
    if causal:
        seen = seen & torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril()
    # rows without any key: computed on finite scores, then set to what the contract says
    empty = ~seen.any(-1)
    bias = log_weight.masked_fill(~present, 0).t()[:, None]
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale + bias
    scores = scores.masked_fill(~seen & ~empty[..., None], -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp() if len(k) else scores
    p = p.masked_fill(empty[..., None], 0)
    return torch.einsum("hij,jhd->ihd", p, v), lse.masked_fill(empty, -torch.inf).t()


def reference_gradients(q, k, v, log_weight, lengths_q, lengths_k, scale, dout, dlse, **masks):
    """out, lse, dq, dk, dv, dlog_weight in float64 from inputs of any type; log_weight None: all 0."""
    if log_weight is None:
        log_weight = torch.zeros(len(k), device=k.device)
        if masks.get("cu_chunks") is not None:
            log_weight = log_weight.expand(len(lengths_q), -1)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, log_weight)]
    out, lse = reference(*leaves, lengths_q, lengths_k, scale, **masks)
    finite = lse != -torch.inf
    loss = (out * dout.double()).sum() + (lse.where(finite, 0) * dlse.double()).sum()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))
