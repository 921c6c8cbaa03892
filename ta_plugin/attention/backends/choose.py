"""Which backend computes a weighted attention call, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ta_plugin.attention.backends.machine import Machine
from ta_plugin.attention.backends.measured import gpu, rate
from ta_plugin.attention.runs import Runs

BACKENDS = ("reference", "sdpa", "flex", "hopper", "flash4")
ON_REQUEST = ("flash4",)  # never chosen: compiles for seconds a kind of call; samples without keys are untested
FEW_QUERIES = 16  # per run, below which a call of sdpa for each run costs more than writing all scores


@dataclass(frozen=True)
class BackendChoice:
    """A backend's name, one of BACKENDS, and the reason it was taken."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Call:
    """What a call asks for, as far as backends differ in it."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    per_query_weights: bool
    causal: bool
    runs: Runs | None
    weighted: bool
    per_head: bool
    weight_grad: bool


def choose(
    requested: str | None,
    *,
    device: torch.device | Machine,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    per_query_weights: bool = False,
    causal: bool = False,
    runs: Runs | None = None,
    weighted: bool = True,
    per_head: bool = False,
    weight_grad: bool = False,
    deterministic: bool = True,
    keys_per_sample: int = 4096,
) -> BackendChoice:
    """The requested backend if it covers the call, else ValueError; without a request the fastest that covers it.

    device: where the call runs; a Machine says what is installed there, a torch.device has it looked up, building nothing
    runs:   with per-query weights, how the queries follow each other
    On a GPU the fastest is looked up in `measured`; a backend without figures for such calls is taken on request only,
    and so are those of ON_REQUEST.
    """
    machine = device if isinstance(device, Machine) else Machine.of(device, build=False)
    call = _Call(dtype, head_dim, value_dim, per_query_weights, causal, runs, weighted, per_head, weight_grad)
    limits = {name: _limit(name, machine, call) for name in BACKENDS}
    if requested is not None:
        if requested not in limits:
            raise ValueError(f"backend is {requested!r}; choose one of {', '.join(map(repr, limits))}, or None")
        limit = limits[requested]
        if limit is not None:
            raise ValueError(f"backend {requested!r} {limit}; pass backend=None to have one chosen that does")
        return BackendChoice(requested, "as requested")
    if runs is not None and runs.mean_length < FEW_QUERIES and limits["sdpa"] is None:
        limits["sdpa"] = f"is slow at {runs.mean_length:.1f} queries a run: it calls its kernel for each"
    rates = {
        name: rate(name, weighted, deterministic, max(head_dim, value_dim), keys_per_sample)
        for name in ("hopper", "flash4", "flex")
        if limits[name] is None
    }
    measured = {name: value for name, value in rates.items() if value is not None}
    able = {name: value for name, value in measured.items() if name not in ON_REQUEST}
    refused: dict[str, list[str]] = {}
    for name, limit in limits.items():
        if limit:
            refused.setdefault(limit, []).append(name)
    others = "; ".join(f"{', '.join(names)}{':' * (len(names) > 1)} {limit}" for limit, names in refused.items())
    if able:
        name = max(able, key=lambda n: able[n])
        figures = ", ".join(
            f"{n} {value:.0f} on an {gpu(n, weighted)}{' (on request only)' if n in ON_REQUEST else ''}"
            for n, value in sorted(measured.items(), key=lambda x: -x[1])
        )
        what = (
            f"head_dim {head_dim}, about {keys_per_sample} keys a sample, {'with' if weighted else 'without'} weights"
        )
        return BackendChoice(
            name,
            f"the fastest as measured for {what} (TFLOP/s forward and backward: {figures})"
            + (f"; {others}" if others else ""),
        )
    for name in ("hopper", "flex", "sdpa"):
        if limits[name] is None:
            return BackendChoice(
                name, f"the fastest that runs {dtype} with head_dim {head_dim} on {machine.kind}; {others}"
            )
    return BackendChoice("reference", others)


def _limit(name: str, machine: Machine, call: _Call) -> str | None:
    """Why a backend does not compute a call here, or None."""
    if name == "reference":
        return None
    if name == "sdpa":
        return _limit_of_sdpa(machine, call)
    if machine.kind != "cuda":
        return f"runs on CUDA, not on {machine.kind}"
    if name == "flex":
        return _limit_of_flex(call)
    return machine.missing.get(name) or (_limit_of_hopper if name == "hopper" else _limit_of_flash4)(machine, call)


def _limit_of_sdpa(machine: Machine, call: _Call) -> str | None:
    if machine.kind != "cpu":
        return f"runs on the CPU, not on {machine.kind}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"runs float32, bfloat16 and float16, not {call.dtype}"
    return _equal_dims(call)


def _limit_of_flex(call: _Call) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"runs float32, bfloat16 and float16, not {call.dtype}"
    if call.per_query_weights:
        return "has no per-query weights"
    return _equal_dims(call)


def _limit_of_hopper(machine: Machine, call: _Call) -> str | None:
    from ta_plugin.attention.backends.hopper import HEAD_DIMS, padded_dim

    if machine.capability != (9, 0):
        return f"is built for sm_90, not {_sm(machine)}"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"runs bfloat16 and float16, not {call.dtype}"
    if padded_dim(call.head_dim, call.value_dim) is None:
        return f"needs head dims up to {HEAD_DIMS[-1]}, not {max(call.head_dim, call.value_dim)}"
    if call.per_query_weights and call.runs is None:
        return "needs to know which queries use which row of weights"
    return None


def _limit_of_flash4(machine: Machine, call: _Call) -> str | None:
    if machine.capability is None or machine.capability[0] != 9:
        return f"is tried here on sm_90 only, not {_sm(machine)}"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"runs bfloat16 and float16, not {call.dtype}"
    if call.head_dim not in (64, 96, 128):
        return f"is tried here with head_dim 64, 96 and 128, not {call.head_dim}"
    if call.per_query_weights or call.per_head:
        return "has no weights per query or head"
    if call.weight_grad:
        return "has no gradient for the weights (its score_mod passes none to its tensors)"
    return _equal_dims(call)


def _equal_dims(call: _Call) -> str | None:
    if call.head_dim == call.value_dim:
        return None
    return f"needs equal head dims for keys and values, not {call.head_dim} and {call.value_dim}"


def _sm(machine: Machine) -> str:
    return "an unknown GPU" if machine.capability is None else "sm_{}{}".format(*machine.capability)
