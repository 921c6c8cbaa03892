"""ta_plugin inside Megatron-core: groups, layer specs, a model on distinct rows. The only package here that imports megatron."""

from ta_plugin.megatron.embedding import SSPTokenEmbedding
from ta_plugin.megatron.groups import SSPGroups, SSPRanks, create_ssp_groups, ssp_group
from ta_plugin.megatron.layer_specs import (
    causal_layer_spec,
    get_causal_layer_spec,
    get_mixed_block_spec,
    get_tokenized_layer_spec,
    tokenized_layer_spec,
)
from ta_plugin.megatron.loss import count_labels, loss_function
from ta_plugin.megatron.microbatches import CheckedMicrobatches, check_microbatches
from ta_plugin.megatron.model import TokenizedModel
from ta_plugin.megatron.plan import RowLayout, TokenizedSeqParams, plan_microbatch
from ta_plugin.megatron.token_keyed import get_token_keyed_block_spec, get_token_keyed_layer_spec, plan_causal

__all__ = [
    "CheckedMicrobatches",
    "RowLayout",
    "SSPGroups",
    "SSPRanks",
    "SSPTokenEmbedding",
    "TokenizedModel",
    "TokenizedSeqParams",
    "causal_layer_spec",
    "check_microbatches",
    "count_labels",
    "create_ssp_groups",
    "get_causal_layer_spec",
    "get_mixed_block_spec",
    "get_token_keyed_block_spec",
    "get_token_keyed_layer_spec",
    "get_tokenized_layer_spec",
    "loss_function",
    "plan_causal",
    "plan_microbatch",
    "ssp_group",
    "tokenized_layer_spec",
]
