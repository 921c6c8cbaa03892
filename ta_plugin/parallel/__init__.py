"""Process groups, and collectives that autograd can pass through."""

from ta_plugin.parallel.buckets import Blank, Buckets
from ta_plugin.parallel.collectives import (
    all_gather_rows,
    all_to_all_rows,
    reduce_scatter_rows,
    start_all_gather_rows,
    start_all_to_all_rows,
)
from ta_plugin.parallel.dense import average_gradients
from ta_plugin.parallel.groups import SSPGroup, create_ssp_group
from ta_plugin.parallel.header import exchange_header
from ta_plugin.parallel.ring import Hop
from ta_plugin.parallel.traffic import Traffic

__all__ = [
    "Blank",
    "Buckets",
    "Hop",
    "SSPGroup",
    "Traffic",
    "all_gather_rows",
    "all_to_all_rows",
    "average_gradients",
    "create_ssp_group",
    "exchange_header",
    "reduce_scatter_rows",
    "start_all_gather_rows",
    "start_all_to_all_rows",
]
