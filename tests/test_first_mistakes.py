"""What is passed wrong first: the message names the argument, its value and the remedy. No ranks needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention, UniqueSpace
from ta_plugin.attention import Scoring, self_attention, target_attention, weighted_attention
from ta_plugin.attention.layers import cross_attention

SPACE = UniqueSpace.from_padded(torch.tensor([[1, 2, 1]]), torch.tensor([3]))  # two rows
ROWS, MORE = torch.zeros(2, 1, 4), torch.zeros(3, 1, 4)
BOUNDS = torch.tensor([0, 2], dtype=torch.int32)
FIT, LONG = torch.tensor([0, 2]), torch.tensor([0, 3])


def asked(
    targets: str, width: int = 4, encode: Any = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Tensor:
    """Target attention by "targets" or "queries" (1, 2, width)."""
    given = {"targets": torch.zeros(1, 2).long(), "queries": torch.zeros(1, 2, width, dtype=dtype)}[targets]
    return attention(**options)(torch.zeros(1, 3).long(), torch.tensor([3]), encode=encode, **{targets: given})


def attention(**options: Any) -> TokenizedAttention:
    sizes: dict[str, Any] = {"batch_size": 1, "sequence_length": 3, "nranks": 1, "embedding_fn": nn.Embedding(5, 4)}
    return TokenizedAttention(**(sizes | options))


MISTAKES: dict[str, Callable[[], object]] = {
    "q has 3 rows, but the space 2; pass one row per distinct token": lambda: self_attention(SPACE, MORE, ROWS, ROWS),
    "k has 3 rows, but the space 2; pass one row per distinct token": lambda: cross_attention(
        SPACE, ROWS, FIT, MORE, MORE
    ),
    "backend is 'flash'; choose one of 'reference', 'sdpa'": lambda: Scoring(backend="flash"),
    "q, k and v are torch.float32, torch.float32 and torch.float64; cast them": lambda: weighted_attention(
        ROWS, ROWS, ROWS.double(), None, BOUNDS, BOUNDS
    ),
    "cu_seqlens_q ends at 3, but there are 2 rows": lambda: weighted_attention(ROWS, ROWS, ROWS, None, LONG, FIT),
    "cu_seqlens_k ends at 3, but there are 2 rows": lambda: weighted_attention(ROWS, ROWS, ROWS, None, FIT, LONG),
    "embedding_dim is 0; pass 1 or more": lambda: ShardedTokenEmbedding(5, 0),
    "optimizer is 'adam'; pass a rule of ta_plugin.row_optimizers": lambda: ShardedTokenEmbedding(
        5, 4, optimizer="adam"
    ),
    "batch_size is -1; pass an int, 0 or more": lambda: attention(batch_size=-1),
    "sequence_length is 3.0; pass an int, 0 or more": lambda: attention(sequence_length=3.0),
    "vocab_size is 6, but embedding_fn has 5 ids; leave it out, or pass 5 or less": lambda: attention(vocab_size=6),
    "nranks is 2, but the group has 1 rank(s); initialise torch.distributed first, or pass nranks=1": lambda: attention(
        nranks=2
    ),
    "queries have width 6, a head_dim of 6 over 1 head(s), but keys have 4; pass queries of width 4": lambda: asked(
        "queries", 6
    ),
    "queries have width 4, a head_dim of 4 over 1 head(s), but keys have 8; pass queries of width 8": lambda: asked(
        "queries", key=nn.Linear(4, 8)
    ),
    "queries have width 6, but query takes 4; pass queries of width 4": lambda: asked(
        "queries", 6, query=nn.Linear(4, 4)
    ),
    "embedding_fn gives rows of width 4, but query takes 6; pass a query map with in_features=4": lambda: asked(
        "targets", query=nn.Linear(6, 4)
    ),
    "embedding_fn gives rows of width 4, but value takes 6; pass a value map with in_features=4": lambda: asked(
        "queries", value=nn.Linear(6, 4)
    ),
    "queries have head_dim 8 over 1 head(s), keys 4 over 1; pass query and key maps (out_features)": lambda: asked(
        "targets", query=nn.Linear(4, 8)
    ),
    "key gives rows of width 4; pass a multiple of its 3 heads": lambda: asked(
        "targets", num_heads=3, query=nn.Linear(4, 6)
    ),
    "queries are torch.bfloat16, but the query map is torch.float32; cast one to the other's dtype, or run under": lambda: (
        asked("queries", dtype=torch.bfloat16, query=nn.Linear(4, 4))
    ),
    "the embedding's rows are torch.float32, but the value map is torch.bfloat16; cast one to the other's": lambda: (
        asked("queries", value=nn.Linear(4, 4).bfloat16())
    ),
    "queries are torch.bfloat16, keys torch.float32; cast them to one dtype, or run under torch.autocast": lambda: (
        asked("queries", dtype=torch.bfloat16)
    ),
    "queries are torch.float64, keys torch.float32; cast them to one": lambda: asked(
        "queries", dtype=torch.float64, normaliser="none"
    ),
    "queries are torch.float64, keys torch.float32, values torch.float32; cast them to one": lambda: self_attention(
        SPACE, ROWS.double(), ROWS, ROWS, scoring=Scoring(normaliser="none")
    ),
    "q is torch.float64, k_table torch.float32; cast them to one dtype": lambda: target_attention(
        ROWS.double(), ROWS, None, torch.arange(2), BOUNDS, BOUNDS, normaliser="none"
    ),
    "q is torch.float32, k_table torch.float32, v_table torch.bfloat16; cast them": lambda: target_attention(
        ROWS, ROWS, ROWS.bfloat16(), torch.arange(2), BOUNDS, BOUNDS
    ),
    "lengths is None; pass (B,) int64": lambda: attention()(torch.zeros(1, 3).long(), None),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_the_message_names_argument_value_and_remedy(says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        MISTAKES[says]()


def test_widths_that_only_the_caller_knows_are_not_refused() -> None:
    """Queries of their own width with a map for it, keys of an encoder's, and scores that are no dot product."""

    class Difference(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return (q[..., :2] - k[..., :2]).square().sum(-1)

    assert asked("queries", 6, query=nn.Linear(6, 4)).shape == (1, 2, 4)
    assert asked("queries", 6, score=Difference()).shape == (1, 2, 4)
    wider = {"key": nn.Linear(9, 4), "value": nn.Linear(9, 5)}
    assert asked("targets", encode=lambda rows, space: rows.repeat(1, 3)[:, :9], **wider).shape == (1, 2, 5)
