"""The model that tokenized layouts must equal: one process, plain attention over all positions, nothing of Megatron."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    vocab: int = 60
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    layers: int = 4
    experts: int = 0
    top_k: int = 2
    aux_coeff: float = 0.0
    samples: int = 3
    length: int = 12
    microbatches: int = 4
    lr: float = 5e-3
    clip: float = 1.0
    per_token: bool = False  # gradients of the mean over all labels of a step, not of the mean of microbatch means

    @property
    def ffn(self) -> int:
        return 4 * self.hidden


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole initial weight of a name, the same in every layout."""
    if "layernorm" in name:
        base = 1.0 if name.endswith("weight") else 0.0
        return base + 0.1 * _normal(name, shape)
    return 0.1 * _normal(name, shape)


def _normal(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def microbatch(sizes: Sizes, step: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, L), lengths (B,), labels (B, L) with -100 where there is none; repeats, padding, an empty sample, an empty batch."""
    g = torch.Generator().manual_seed(1000 * (step % 3) + index)
    share = 1.0 / torch.arange(1, sizes.vocab + 1)
    tokens = torch.multinomial(share, sizes.samples * sizes.length, replacement=True, generator=g)
    tokens = tokens.view(sizes.samples, sizes.length) * 7 % sizes.vocab
    lengths = torch.randint(0, sizes.length + 1, (sizes.samples,), generator=g)
    lengths[0] = sizes.length
    if index == 1:
        lengths[1] = 0
    if index == 2 and step % 3 == 1:
        lengths.zero_()
    labels = torch.randint(0, sizes.vocab, tokens.shape, generator=g)
    labels[torch.rand(tokens.shape, generator=g) < 0.4] = -100
    labels[:, ::5] = 3  # the same label on occurrences of the same token
    return tokens, lengths, labels


def parameter_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    h, head = sizes.hidden, sizes.hidden // sizes.heads
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (sizes.vocab, h)}
    for i in range(sizes.layers):
        p = f"decoder.layers.{i}."
        shapes |= {
            p + "input_layernorm.weight": (h,),
            p + "input_layernorm.bias": (h,),
            p + "self_attention.linear_qkv.weight": (h + 2 * sizes.groups * head, h),
            p + "self_attention.linear_qkv.bias": (h + 2 * sizes.groups * head,),
            p + "self_attention.linear_proj.weight": (h, h),
            p + "self_attention.linear_proj.bias": (h,),
            p + "pre_mlp_layernorm.weight": (h,),
            p + "pre_mlp_layernorm.bias": (h,),
        }
        if sizes.experts:
            shapes[p + "mlp.router.weight"] = (sizes.experts, h)
            for e in range(sizes.experts):
                shapes[p + f"mlp.experts.local_experts.{e}.linear_fc1.weight"] = (sizes.ffn, h)
                shapes[p + f"mlp.experts.local_experts.{e}.linear_fc2.weight"] = (h, sizes.ffn)
        else:
            shapes |= {
                p + "mlp.linear_fc1.weight": (sizes.ffn, h),
                p + "mlp.linear_fc1.bias": (sizes.ffn,),
                p + "mlp.linear_fc2.weight": (h, sizes.ffn),
                p + "mlp.linear_fc2.bias": (h,),
            }
    shapes |= {"decoder.final_layernorm.weight": (h,), "decoder.final_layernorm.bias": (h,)}
    shapes["output_layer.weight"] = (sizes.vocab, h)
    # Megatron's sequential experts are built without biases, and one option rules all of them
    no_bias = sizes.experts > 0
    return {n: s for n, s in shapes.items() if not (no_bias and n.endswith("bias") and "layernorm" not in n)}


class DenseModel:
    """Forward over positions in float64, gradients by autograd, AdamW, clipping to the global norm."""

    def __init__(self, sizes: Sizes, causal_from: int | None = None) -> None:
        self.sizes = sizes
        self.causal_from = causal_from  # layers from this one on are causal (mixed stacks)
        self.p = {n: weight(n, s).double().requires_grad_() for n, s in parameter_shapes(sizes).items()}
        self.optimizer = torch.optim.AdamW(self.p.values(), lr=sizes.lr, weight_decay=0.0)

    def train(self, steps: int) -> tuple[list[float], list[float]]:
        """Losses (mean over microbatches) and gradient norms of each step."""
        losses, norms = [], []
        for step in range(steps):
            self.optimizer.zero_grad()
            batches = [microbatch(self.sizes, step, index) for index in range(self.sizes.microbatches)]
            labelled = [((y >= 0) & (torch.arange(y.shape[1]) < n[:, None])).sum().item() for _, n, y in batches]
            reported = 0.0
            for batch, count in zip(batches, labelled, strict=True):
                loss, aux = self.loss(*batch)
                share = count / sum(labelled) if self.sizes.per_token else 1 / self.sizes.microbatches
                (loss * share + aux / self.sizes.microbatches).backward()
                reported += loss.item() / self.sizes.microbatches
            norm = torch.nn.utils.clip_grad_norm_(list(self.p.values()), self.sizes.clip)
            self.optimizer.step()
            losses.append(reported)
            norms.append(norm.item())
        return losses, norms

    def loss(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden, aux = self.hidden(tokens, lengths)
        logits = hidden @ self.p["output_layer.weight"].T
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        target = labels.masked_fill(~inside, -100)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1), aux

    def hidden(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        x, aux = F.embedding(tokens, self.p["embedding.weight"]), torch.zeros((), dtype=torch.float64)
        for i in range(self.sizes.layers):
            p = f"decoder.layers.{i}."
            causal = self.causal_from is not None and i >= self.causal_from
            x = x + self._attention(p, self._norm(p + "input_layernorm", x), inside, causal)
            y = self._norm(p + "pre_mlp_layernorm", x)
            if self.sizes.experts:
                out, layer_aux = self._experts(p, y, inside)
                x, aux = x + out, aux + layer_aux
            else:
                x = x + self._linear(p + "mlp.linear_fc2", F.gelu(self._linear(p + "mlp.linear_fc1", y)))
        return self._norm("decoder.final_layernorm", x), aux

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"], 1e-5)

    def _attention(self, p: str, x: Tensor, inside: Tensor, causal: bool) -> Tensor:
        s = self.sizes
        b, n, head, share = x.shape[0], x.shape[1], s.hidden // s.heads, s.heads // s.groups
        mixed = self._linear(p + "self_attention.linear_qkv", x)
        grouped = mixed.view(b, n, s.groups, (share + 2) * head)  # Megatron keeps each group's q, k, v together
        q, k, v = grouped.split([share * head, head, head], -1)
        q = q.reshape(b, n, s.heads, head).transpose(1, 2)
        k, v = (t.transpose(1, 2).repeat_interleave(share, 1) for t in (k, v))
        hidden = ~inside[:, None, None, :].expand(b, 1, n, n)
        if causal:
            hidden = hidden | torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.mT / math.sqrt(head)).masked_fill(hidden, -1e30)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, s.hidden)
        return self._linear(p + "self_attention.linear_proj", out)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def _experts(self, p: str, x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        s = self.sizes
        rows = x[inside]
        logits = rows @ self.p[p + "mlp.router.weight"].T
        top, chosen = logits.topk(s.top_k, -1)
        share = torch.zeros_like(logits).scatter(1, chosen, top.softmax(-1))
        out = torch.zeros_like(rows)
        for e in range(s.experts):
            q = p + f"mlp.experts.local_experts.{e}."
            y = F.gelu(rows @ self.p[q + "linear_fc1.weight"].T) @ self.p[q + "linear_fc2.weight"].T
            out = out + share[:, e, None] * y
        whole = torch.zeros_like(x)
        whole[inside] = out
        count = max(rows.shape[0], 1)
        load = torch.zeros_like(logits).scatter(1, chosen, 1.0).sum(0)
        aux = s.aux_coeff * s.experts * (logits.softmax(-1).sum(0) * load).sum() / (s.top_k * count * count)
        return whole, aux
