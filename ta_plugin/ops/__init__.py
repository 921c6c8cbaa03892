"""Primitive operations on packed rows; each is differentiable and bitwise repeatable."""

from ta_plugin.ops.segments import Segments, expand, segment_logsumexp, segment_sum

__all__ = ["Segments", "expand", "segment_logsumexp", "segment_sum"]
