"""How an attention over routed tokens is carried out, and the cost model that chooses."""

from ta_plugin.strategies.cost import (
    Estimate,
    Explanation,
    Rates,
    Workload,
    choose_strategy,
    estimate,
    explain,
    id_shares,
)
from ta_plugin.strategies.gather import gather
from ta_plugin.strategies.owner import owner
from ta_plugin.strategies.request import AttentionModules, Request, fetch

__all__ = [
    "AttentionModules",
    "Estimate",
    "Explanation",
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
]
