"""torch's nn.MultiheadAttention over the distinct tokens of each sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin.attention import Scoring, self_attention
from ta_plugin.deepspeed.plan import TokenPlan


class TokenizedMultiheadAttention(nn.MultiheadAttention):
    """Self-attention on distinct tokens, projections included; any other call is nn.MultiheadAttention's own.

    Exact where hidden states depend on the token only (no positions below). Rows past a sample's length are 0.
    """

    _plan: TokenPlan
    _scoring: Scoring

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, plan: TokenPlan, scoring: Scoring) -> None:
        """Turn a module into this class in place: parameters, names and optimizers that hold them stay as they are."""
        module.__class__ = cls
        vars(module).update(_plan=plan, _scoring=scoring)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward; key_padding_mask is taken from the plan's lengths where the call is tokenized.

        A mask where the plan has no lengths is one that the block does not know: such a call is not tokenized.
        """
        x = query if self.batch_first or query.dim() != 3 else query.transpose(0, 1)
        ours = query is key and key is value and x.dim() == 3 and self._plan.fits(x)
        ours = ours and self._plan.knows(key_padding_mask)
        if not ours or need_weights or attn_mask is not None or is_causal or (self.training and self.dropout):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._plan.check_once(self, type(self).__name__, x)
        space = self._plan.space
        assert space is not None
        packed = F.linear(self._plan.rows_of(x), self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.unflatten(1, (self.num_heads, self.head_dim)) for part in packed.chunk(3, 1))
        rows = self_attention(space, q, k, v, scoring=self._scoring).flatten(1)
        out = space.expand(self.out_proj(rows))
        return out if self.batch_first else out.transpose(0, 1), None


def why_not_multihead(module: nn.MultiheadAttention) -> str | None:
    """What keeps a module from being tokenized exactly, or None."""
    if module.dropout:
        return f"dropout is {module.dropout}: occurrences of a token would drop together; build it with dropout=0"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys that are no tokens (add_bias_kv, add_zero_attn)"
    if not module._qkv_same_embed_dim:
        return "its keys and values have another width than its queries, so it is no self-attention"
    return None
