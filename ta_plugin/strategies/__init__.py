"""How an attention over routed tokens is carried out, and the cost model that chooses."""

from ta_plugin.strategies.causal_ranks import CausalRows, causal_over_ranks, pieces_of, zigzag
from ta_plugin.strategies.cost import (
    Estimate,
    Explanation,
    Layout,
    Rates,
    Workload,
    choose_strategy,
    estimate,
    explain,
    id_shares,
)
from ta_plugin.strategies.gather import gather
from ta_plugin.strategies.halo import Halo
from ta_plugin.strategies.modules import AttentionModules
from ta_plugin.strategies.owned import OwnedRows
from ta_plugin.strategies.owner import owner
from ta_plugin.strategies.request import Request, fetch
from ta_plugin.strategies.ring import ring, ring_attention, row_attention

__all__ = [
    "AttentionModules",
    "CausalRows",
    "Estimate",
    "Explanation",
    "Halo",
    "Layout",
    "OwnedRows",
    "Rates",
    "Request",
    "Workload",
    "causal_over_ranks",
    "choose_strategy",
    "estimate",
    "explain",
    "fetch",
    "gather",
    "id_shares",
    "owner",
    "pieces_of",
    "ring",
    "ring_attention",
    "row_attention",
    "zigzag",
]
