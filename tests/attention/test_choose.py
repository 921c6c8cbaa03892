"""Which backend a call gets: every branch, from descriptions of machines that need not be here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ta_plugin.attention.backends import BACKENDS, BackendChoice, Machine, choose
from ta_plugin.attention.backends.choose import FEW_QUERIES
from ta_plugin.attention.backends.measured import RATES, rate
from ta_plugin.attention.runs import Runs

CPU = Machine("cpu")
HOPPER = Machine("cuda", (9, 0))
NO_FLASH4 = Machine("cuda", (9, 0), {"flash4": "flash-attn-4 is not installed"})
UNBUILT = Machine("cuda", (9, 0), {"hopper": "nvcc is not on the path", "flash4": "flash-attn-4 is not installed"})
AMPERE = Machine("cuda", (8, 0), {"flash4": "flash-attn-4 is not installed"})
IN_ORDER = Runs([0, 64, 128], [0, 0], [0, 1], 2)
SHARED_ROWS = Runs([0, 64, 128, 192], [0, 0, 1], [0, 1, 0], 2)


def chosen(machine: Machine, requested: str | None = None, **changes: Any) -> BackendChoice:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64}
    return choose(requested, device=machine, **(options | changes))


@pytest.mark.parametrize(
    ("machine", "changes", "name", "why"),
    [
        (CPU, {}, "sdpa", "the fastest that runs torch.bfloat16"),
        (CPU, {"causal": True}, "sdpa", "runs on CUDA"),
        (CPU, {"dtype": torch.float64}, "reference", "sdpa runs float32, bfloat16 and float16, not torch.float64"),
        (CPU, {"value_dim": 9}, "reference", "64 and 9"),
        (CPU, {"per_query_weights": True, "runs": IN_ORDER}, "sdpa", "hopper, flash4: runs on CUDA"),
        (CPU, {"per_query_weights": True, "runs": Runs([0, 1, 2], [0, 0], [0, 1], 2)}, "reference", "1.0 queries a run"),
        (HOPPER, {}, "hopper", "hopper 505 on an H100, flex 337 on an H200"),
        (HOPPER, {"deterministic": False}, "hopper", "hopper 545 on an H100, flash4 409 on an H200 (on request only), flex 337 on an H200"),
        (HOPPER, {"deterministic": False, "weighted": False}, "hopper", "hopper 545 on an H100, flash4 541 on an H100 (on request only)"),
        (HOPPER, {"deterministic": False, "weighted": False, "keys_per_sample": 200, "causal": True}, "hopper", "flash4 389"),
        (HOPPER, {"weighted": False}, "hopper", "flash4 508 on an H100 (on request only), hopper 505 on an H100"),
        (NO_FLASH4, {"deterministic": False, "weighted": False}, "hopper", "flash-attn-4 is not installed"),
        (HOPPER, {"weight_grad": True, "deterministic": False}, "hopper", "no gradient for the weights"),
        (HOPPER, {"per_head": True, "deterministic": False}, "hopper", "flash4 has no weights per query or head"),
        (HOPPER, {"head_dim": 40, "value_dim": 40}, "hopper", "flash4 is tried here with head_dim 64, 96 and 128, not 40"),
        (HOPPER, {"head_dim": 64, "value_dim": 96}, "hopper", "needs equal head dims"),
        (HOPPER, {"head_dim": 192, "value_dim": 192}, "flex", "hopper needs head dims up to 128, not 192"),
        (HOPPER, {"dtype": torch.float32}, "flex", "hopper, flash4: runs bfloat16 and float16, not torch.float32"),
        (HOPPER, {"dtype": torch.float64}, "reference", "flex runs float32"),
        (HOPPER, {"per_query_weights": True, "runs": IN_ORDER}, "hopper", "flex has no per-query weights"),
        (HOPPER, {"per_query_weights": True, "runs": SHARED_ROWS}, "hopper", "flex has no per-query weights"),
        (HOPPER, {"per_query_weights": True}, "reference", "which queries use which row"),
        (HOPPER, {"per_query_weights": True, "runs": IN_ORDER, "causal": True}, "hopper", "the fastest as measured"),
        (UNBUILT, {}, "flex", "hopper nvcc is not on the path"),
        (AMPERE, {}, "flex", "hopper is built for sm_90, not sm_80"),
        (AMPERE, {"per_query_weights": True, "runs": IN_ORDER}, "reference", "sdpa runs on the CPU, not on cuda"),
        (Machine("xpu"), {}, "reference", "flex, hopper, flash4: runs on CUDA, not on xpu"),
        (Machine("cuda"), {}, "flex", "hopper is built for sm_90, not an unknown GPU"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(machine: Machine, changes: dict[str, Any], name: str, why: str) -> None:
    choice = chosen(machine, **changes)
    assert choice.name == name
    assert why in choice.reason


def test_a_request_is_kept_or_refused_with_the_reason() -> None:
    assert chosen(CPU, "reference") == BackendChoice("reference", "as requested")
    assert chosen(HOPPER, "flex").name == "flex"
    few = Runs([0, 1, 2], [0, 0], [0, 1], 2)
    assert few.mean_length < FEW_QUERIES
    assert chosen(CPU, "sdpa", per_query_weights=True, runs=few).name == "sdpa"  # slow, but it was asked for
    with pytest.raises(ValueError, match="backend 'hopper' nvcc is not on the path; pass backend=None"):
        chosen(UNBUILT, "hopper")
    with pytest.raises(ValueError, match="backend 'flex' runs on CUDA, not on cpu"):
        chosen(CPU, "flex")
    with pytest.raises(ValueError, match="backend is 'fast'; choose one of 'reference', 'sdpa', 'flex'"):
        chosen(CPU, "fast")


def test_a_device_is_looked_up_without_building() -> None:
    assert choose(None, device=torch.device("cpu"), dtype=torch.float32, head_dim=8, value_dim=8).name == "sdpa"
    assert Machine.of(torch.device("cpu")) == CPU


@pytest.mark.parametrize(("dim", "share"), [(64, 1.0), (32, 0.5), (96, 0.75), (128, 1.0)])
def test_padding_counts_against_a_backend(dim: int, share: float) -> None:
    padded = 64 if dim <= 64 else 128
    full = rate("hopper", True, True, padded, 4096)
    assert full is not None
    assert rate("hopper", True, True, dim, 4096) == pytest.approx(full * share)
    assert rate("hopper", True, True, 129, 4096) is None


def test_rates_are_looked_up_by_the_nearest_length() -> None:
    table = RATES["hopper", True, True][0]
    found = [rate("hopper", True, True, 64, keys) for keys in (1, 1024, 2048, 2049, 8192, 8193, 10**6)]
    assert found == [table[i] for i in (0, 0, 0, 1, 1, 2, 2)]
    assert {name for name, *_ in RATES} <= set(BACKENDS)
