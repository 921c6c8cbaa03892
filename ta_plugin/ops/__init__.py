"""Primitive operations on packed rows; each is differentiable and bitwise repeatable."""

from ta_plugin.ops.load import LoadedOp, load_op, operators
from ta_plugin.ops.merging import merge_into, merge_partials
from ta_plugin.ops.planning import UniqueRows, unique_rows
from ta_plugin.ops.segments import Segments, expand, segment_logsumexp, segment_sum

__all__ = [
    "LoadedOp",
    "Segments",
    "UniqueRows",
    "expand",
    "load_op",
    "merge_into",
    "merge_partials",
    "operators",
    "segment_logsumexp",
    "segment_sum",
    "unique_rows",
]
