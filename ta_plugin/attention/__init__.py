"""Attention over distinct tokens: the kernel contracts and the layers composed from them."""

from ta_plugin.attention.causal import causal_attention
from ta_plugin.attention.chunk_cost import choose_chunk
from ta_plugin.attention.chunks import CausalChunks
from ta_plugin.attention.decay import DecayKind, HeadDecay, alibi_slopes
from ta_plugin.attention.layers import cross_attention, padded_target_attention, self_attention
from ta_plugin.attention.merge import merge
from ta_plugin.attention.scoring import Scoring
from ta_plugin.attention.target import target_attention
from ta_plugin.attention.weighted import weighted_attention

__all__ = [
    "CausalChunks",
    "DecayKind",
    "HeadDecay",
    "Scoring",
    "alibi_slopes",
    "causal_attention",
    "choose_chunk",
    "cross_attention",
    "merge",
    "padded_target_attention",
    "self_attention",
    "target_attention",
    "weighted_attention",
]
