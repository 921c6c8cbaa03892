"""Exact attention over the distinct tokens of a sequence, on one rank or many."""

from ta_plugin.captured import CapturedStep
from ta_plugin.embedding import ShardedTokenEmbedding, clip_grad_norm_
from ta_plugin.parallel import SSPGroup, create_ssp_group
from ta_plugin.tokenized_attention import TokenizedAttention
from ta_plugin.unique_space import UniqueSpace

__all__ = [
    "CapturedStep",
    "SSPGroup",
    "ShardedTokenEmbedding",
    "TokenizedAttention",
    "UniqueSpace",
    "clip_grad_norm_",
    "create_ssp_group",
]
