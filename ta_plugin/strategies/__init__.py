"""How an attention over routed tokens is carried out, and the cost model that chooses."""

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
from ta_plugin.strategies.owned import OwnedRows
from ta_plugin.strategies.owner import owner
from ta_plugin.strategies.request import AttentionModules, Request, fetch
from ta_plugin.strategies.ring import ring, ring_attention, row_attention

__all__ = [
    "AttentionModules",
    "Estimate",
    "Explanation",
    "Layout",
    "OwnedRows",
    "Rates",
    "Request",
    "Workload",
    "choose_strategy",
    "estimate",
    "explain",
    "fetch",
    "gather",
    "id_shares",
    "owner",
    "ring",
    "ring_attention",
    "row_attention",
]
