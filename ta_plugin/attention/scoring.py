"""How queries and keys become weights: the score function and the normaliser, as separate options."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ta_plugin.attention.backends.choose import BACKENDS
from ta_plugin.attention.dense import Activation, Normaliser, dense_attention
from ta_plugin.attention.merge import merge
from ta_plugin.attention.projections import one_dtype
from ta_plugin.attention.weighted import weighted_attention


@dataclass(frozen=True)
class Scoring:
    """Options of one attention.

    scale:      of the dot product; head_dim ** -0.5 by default
    score:      None for the dot product, or a module: q (n, Tq, 1, H, D), k (n, 1, Tk, H, D) -> (n, Tq, Tk, H)
    normaliser: "softmax" or "none"
    activation: applied to the scores when nothing normalises them (torch.nn.functional.silu gives HSTU's pointwise attention)
    backend:    of `weighted_attention`; None has one chosen
    deterministic: whether its backward repeats bit for bit
    """

    scale: float | None = None
    score: nn.Module | None = None
    normaliser: Normaliser = "softmax"
    activation: Activation | None = None
    backend: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        if self.normaliser not in ("softmax", "none"):
            raise ValueError(f"normaliser is {self.normaliser!r}; pass 'softmax' or 'none'")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
        if self.activation is not None and self.normaliser == "softmax":
            raise ValueError(
                "activation is given with normaliser='softmax'; put it inside a score module, or pass 'none'"
            )
        if self.score is not None and self.scale is not None:
            raise ValueError("scale is given with a score module; scale inside the module instead")
        for module in self.score.modules() if self.score is not None else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
                raise ValueError(
                    f"score contains {type(module).__name__}, which sees distinct tokens instead of occurrences, so its result "
                    "would differ from attention over positions; use LayerNorm, and no dropout, inside score"
                )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        q_chunk: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Packed attention with these options: out (Q, H, Dv), and lse (Q, H) under softmax.

        q, k, v: of one dtype, or ValueError; under torch.autocast queries and values take the keys' dtype
        weight: log weights under softmax, multipliers after the activation otherwise; shapes as in `dense_attention`
        """
        q, v = one_dtype(q, k, v)
        if self.score is None and self.normaliser == "softmax":
            return weighted_attention(
                q, k, v, weight, cu_seqlens_q, cu_seqlens_k,
                scale=self.scale, q_chunk=q_chunk, return_lse=True, backend=self.backend, deterministic=self.deterministic,
            )  # fmt: skip
        if self.normaliser == "none":
            return self.pointwise(q, k, v, weight, cu_seqlens_q, cu_seqlens_k, q_chunk), None
        return dense_attention(
            q, k, v, weight, cu_seqlens_q, cu_seqlens_k, scale=self._scale(q), score=self.score, q_chunk=q_chunk
        )

    def pointwise(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        multiplier: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        q_chunk: Tensor | None = None,
    ) -> Tensor:
        """out (Q, H, Dv) = sum_u multiplier_u activation(score_u) v_u: partial sums of disjoint key sets add."""
        out, _ = dense_attention(
            q, k, v, multiplier, cu_seqlens_q, cu_seqlens_k,
            scale=self._scale(q), score=self.score, activation=self.activation, normaliser="none", q_chunk=q_chunk,
        )  # fmt: skip
        return out

    def _scale(self, q: Tensor) -> float:
        return q.shape[2] ** -0.5 if self.scale is None else self.scale

    def combine(self, outs: Tensor, lses: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Partial results over disjoint keys, outs (N, Q, H, Dv) and lses (N, Q, H), into one."""
        return (outs.sum(0), None) if lses is None else merge(outs, lses)


def singletons(n: int, device: torch.device) -> Tensor:
    """cu_seqlens of n samples of one row each."""
    return torch.arange(n + 1, dtype=torch.int32, device=device)
