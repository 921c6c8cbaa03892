"""Target attention through the strategies by the row-gathering kernel: it is called, and equals the reference backend."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin import SSPGroup, TokenizedAttention
from ta_plugin.ops import load_op
from ta_plugin.ops.registry import is_compiled
from ta_plugin.strategies import partial

B, L, T, E, H, VOCAB = 3, 24, 2, 8, 4, 30


def build(strategy: str, backend: str | None, options: dict[str, Any], ranks: int = 1) -> TokenizedAttention:
    torch.manual_seed(0)
    width = options.pop("head_width", 8)
    bias = options.pop("map_bias", True)
    kv = options.get("num_kv_heads", H)
    maps: dict[str, nn.Module | None] = {"query": nn.Linear(E, width * H, bias=bias)}
    maps |= {name: nn.Linear(E, width * kv, bias=bias) for name in ("key", "value")}
    if options.pop("no_maps", False):
        maps = {}
    table = nn.Embedding(VOCAB, E)
    group = SSPGroup(dist.group.WORLD) if ranks > 1 else None
    return TokenizedAttention(
        B, L, ranks, table, group=group, strategy=strategy, backend=backend, num_heads=H, **maps, **options
    ).double()


def batch(rank: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return {
        "tokens": torch.randint(0, VOCAB, (B, L), generator=g),
        "lengths": torch.tensor([L, 0, 9]),
        "targets": torch.randint(0, VOCAB, (B, T), generator=g),
        "target_lengths": torch.tensor([2, 2, 1]),
    }


def compare(strategy: str, options: dict[str, Any], call: dict[str, Any], ranks: int = 1, rank: int = 0) -> int:
    """Outputs and every gradient equal the reference backend's; how often the gathering kernel ran."""
    calls = 0
    original = partial.target_attention

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **named)

    results = []
    for backend in ("reference", None):
        model = build(strategy, backend, dict(options), ranks)
        model.projections.may_absorb = backend is None  # the reference projects every row
        partial.target_attention = counted  # type: ignore[assignment]
        try:
            out = model(**batch(rank), **call)
        finally:
            partial.target_attention = original
        out.sin().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        if backend == "reference":
            assert calls == 0
    assert len(results[0]) == len(results[1])
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)
    return calls


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    pytest.importorskip("deepspeed")
    op = load_op("target_attention")
    assert op.implementation == "compiled", op.reason


CUTOFFS = torch.tensor([[5, 24], [0, 3], [9, 0]])
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "projected": ({"head_width": 2, "num_kv_heads": 1}, {}),
    "absorbed": ({"head_width": 64}, {}),
    "absorbed without biases": ({"head_width": 64, "map_bias": False, "num_kv_heads": 2}, {}),
    "the embedding itself": ({"no_maps": True}, {}),
    "own key": ({"head_width": 64, "include_self": True}, {}),
    "cutoffs": ({"head_width": 64}, {"target_cutoffs": CUTOFFS}),
    "bias per head": ({"head_width": 64}, {"bias": torch.randn(B, L, H).double()}),
    "bias and cutoffs": ({"head_width": 2}, {"bias": torch.randn(B, L, H).double(), "target_cutoffs": CUTOFFS}),
    "no normaliser": ({"head_width": 64, "normaliser": "none"}, {}),
    "silu": ({"head_width": 2, "normaliser": "none", "activation": F.silu}, {"multiplier": torch.rand(B, L).double()}),
    "silu, absorbed": ({"head_width": 64, "normaliser": "none", "activation": F.silu}, {"target_cutoffs": CUTOFFS}),
}


@pytest.mark.parametrize("strategy", ["gather", "owner"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(strategy: str, case: str) -> None:
    assert compare(strategy, *CASES[case]) == 1


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"head_width": 2, "normaliser": "none", "activation": F.relu}, {}),
        ({"head_width": 2}, {"value_term": torch.randn(B, L, H, 2).double()}),
    ],
)
def test_what_no_kernel_covers_goes_the_old_way(options: dict[str, Any], call: dict[str, Any]) -> None:
    assert compare("gather", options, call) == 0


def test_one_rank_neither_routes_nor_merges_and_reads_little_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, full = build("owner", None, {"head_width": 64}), batch()
    del full["target_lengths"]  # every slot is a target
    lists, read = [], Tensor.tolist  # the profiler does not see it on the CPU
    monkeypatch.setattr(Tensor, "tolist", lambda x: lists.append(x) or read(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**full).sum().backward()
    called = {event.key: event.count for event in profile.key_averages()}
    assert called["aten::index_select"] > 0
    assert {"aten::bincount", "ta_plugin::partition", "ta_plugin::merge"} & set(called) == set()
    assert lists
    assert called.get("aten::nonzero", 0) + called.get("aten::_local_scalar_dense", 0) + len(lists) <= 5


def on_rank(case: str) -> int:
    load_op("target_attention")
    assert is_compiled("target_attention", "cpu")
    return compare("owner", *CASES[case], ranks=2, rank=dist.get_rank())


@pytest.mark.parametrize("case", ["absorbed", "own key", "bias and cutoffs", "silu, absorbed"])
def test_two_owners_equal_the_reference(rank_pools: Any, case: str) -> None:
    assert rank_pools(2).run(on_rank, case) == [1, 1]
