"""What is passed wrong first: the message names the argument, its value and the remedy. No ranks needed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention, UniqueSpace
from ta_plugin.attention import Scoring, self_attention, weighted_attention
from ta_plugin.attention.layers import cross_attention

SPACE = UniqueSpace.from_padded(torch.tensor([[1, 2, 1]]), torch.tensor([3]))  # two rows
ROWS, MORE = torch.zeros(2, 1, 4), torch.zeros(3, 1, 4)
BOUNDS = torch.tensor([0, 2], dtype=torch.int32)
FIT, LONG = torch.tensor([0, 2]), torch.tensor([0, 3])


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
    "lengths is None; pass (B,) int64": lambda: attention()(torch.zeros(1, 3).long(), None),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_the_message_names_argument_value_and_remedy(says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        MISTAKES[says]()
