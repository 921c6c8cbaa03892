"""Which backend computes a weighted attention call, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BackendChoice:
    """A backend's name ("reference", "sdpa" or "flex") and the reason it was taken."""

    name: str
    reason: str


def choose(
    requested: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    per_query_weights: bool,
    causal: bool,
) -> BackendChoice:
    """The requested backend if it covers the call, else an error; without a request the fastest that covers it."""
    call = _limit(dtype, head_dim, value_dim, per_query_weights, causal)  # what no kernel but the reference covers
    on_cpu = None if device.type == "cpu" else f"runs on the CPU, not on {device.type}"
    on_cuda = (
        None if device.type == "cuda" else f"runs on CUDA, not on {device.type} (FlexAttention has no backward there)"
    )
    limits = {"reference": None, "sdpa": on_cpu or call, "flex": on_cuda or call}
    if requested is not None:
        if requested not in limits:
            raise ValueError(f"backend is {requested!r}; choose one of {', '.join(map(repr, limits))}, or None")
        limit = limits[requested]
        if limit is not None:
            raise ValueError(f"backend {requested!r} {limit}; pass backend=None to have one chosen that does")
        return BackendChoice(requested, "as requested")
    for name in ("flex", "sdpa"):
        if limits[name] is None:
            return BackendChoice(name, f"the fastest that runs {dtype} with head_dim {head_dim} on {device.type}")
    return BackendChoice("reference", "; ".join(f"{name} {limit}" for name, limit in limits.items() if limit))


def _limit(dtype: torch.dtype, head_dim: int, value_dim: int, per_query_weights: bool, causal: bool) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"runs float32, bfloat16 and float16, not {dtype}"
    if per_query_weights or causal:
        return "has neither per-query weights nor a causal mask"
    return (
        f"needs equal head dims for keys and values, not {head_dim} and {value_dim}" if head_dim != value_dim else None
    )
