"""The core on a GPU: FlexAttention against float64, the class against the oracle, bitwise repeats. Runs where CUDA is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ta_plugin import ShardedTokenEmbedding, SSPGroup, TokenizedAttention, UniqueSpace
from ta_plugin.attention import weighted_attention
from ta_plugin.attention.backends import Machine, choose
from ta_plugin.data.interactions import load_interactions
from ta_plugin.models.recommender import RecommenderConfig
from ta_plugin.models.trainer import RecommenderTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def packed(
    dtype: torch.dtype, per_head: bool, lens_q: list[int], lens_k: list[int], dim: int = 64
) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int().cuda() for lens in (lens_q, lens_k))
    heads, kv_heads = 4, 2
    q = torch.randn(int(cu_q[-1]), heads, dim, device="cuda", dtype=dtype)
    k, v = (torch.randn(int(cu_k[-1]), kv_heads, dim, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(int(cu_k[-1]), *((heads,) if per_head else ()), device="cuda").mul(4)
    weight[1] = -torch.inf
    k[1], v[1] = torch.nan, torch.nan  # an absent key's rows reach nobody
    return [q, k, v, weight], cu_q, cu_k


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lens", [([300, 0, 70, 129], [411, 5, 0, 130]), ([1, 1, 2], [900, 3, 17])])
def test_flex_against_float64(lens: Any, dtype: torch.dtype, per_head: bool) -> None:
    inputs, cu_q, cu_k = packed(dtype, per_head, *lens)
    results = []
    for backend, kind in (("flex", None), ("reference", torch.float64)):
        leaves = [x.detach().clone().to(kind or x.dtype).requires_grad_() for x in inputs]
        out, lse = weighted_attention(*leaves, cu_q, cu_k, return_lse=True, backend=backend)
        present = lse > -torch.inf
        (out.double().square().sum() + lse.double()[present].sin().sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves)])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3  # fp32 matrix units may run tf32
    for ours, exact in zip(*results, strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        error = (ours.double()[finite] - exact[finite]).norm() / exact[finite].norm().clamp(min=1e-12)
        assert error < tolerance


@pytest.mark.parametrize("dim", [8, 15])  # narrower than torch's kernel takes
def test_flex_with_small_head_dims_against_float64(dim: int) -> None:
    inputs, *bounds = packed(torch.float32, True, [300, 0, 70, 129], [411, 5, 0, 130], dim)
    assert max(errors_of("flex", inputs, bounds)) < 1e-5


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def errors_of(backend: str, inputs: Sequence[Tensor | None], bounds: Sequence[Tensor], **options: Any) -> list[float]:
    """Relative errors of out, lse and the gradients of a backend against the reference in float64."""
    results = []
    for name, kind in ((backend, None), ("reference", torch.float64)):
        leaves = [None if x is None else x.detach().clone().to(kind or x.dtype).requires_grad_() for x in inputs]
        out, lse = weighted_attention(*leaves, *bounds, return_lse=True, backend=name, **options)  # type: ignore[misc]
        present = lse > -torch.inf
        (out.double().square().sum() + lse.double()[present].sin().sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves if x is not None)])
    found = []
    for ours, exact in zip(*results, strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        found.append(float((ours.double()[finite] - exact[finite]).norm() / exact[finite].norm().clamp(min=1e-12)))
    return found


@needs_hopper
@pytest.mark.parametrize("weight", ["none", "shared", "per_head"])
@pytest.mark.parametrize(("dim", "value_dim"), [(40, 40), (64, 64), (96, 96), (80, 128)])
def test_hopper_against_float64(weight: str, dim: int, value_dim: int) -> None:
    (q, k, v, w), cu_q, cu_k = packed(torch.bfloat16, weight == "per_head", [300, 0, 70, 129], [411, 5, 0, 130])
    v = v.repeat(1, 1, 2)[..., :value_dim]
    q, k = (x.repeat(1, 1, 2)[..., :dim] for x in (q, k))
    if weight == "none":
        k, v = k.nan_to_num(), v.nan_to_num()
    inputs = [q, k, v, None if weight == "none" else w]
    assert max(errors_of("hopper", inputs, (cu_q, cu_k))) < 1e-2


@needs_hopper
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_hopper_with_chunks_of_queries_against_float64(prefix: bool, per_head: bool) -> None:
    (q, k, v, _), cu_q, cu_k = packed(torch.bfloat16, False, [300, 0, 70, 129], [411, 5, 0, 130])
    chunk = torch.arange(q.shape[0], device="cuda") // 100  # cut where samples end too
    sample = torch.bucketize(torch.arange(q.shape[0], device="cuda"), cu_q[1:].contiguous(), right=True)
    chunk = torch.unique_consecutive(chunk * 4 + sample, return_inverse=True)[1]
    chunks = int(chunk[-1]) + 1
    w = torch.randn(chunks, k.shape[0], *((4,) if per_head else ()), device="cuda").mul(4)
    k, v = k.nan_to_num(), v.nan_to_num()
    options = {"q_chunk": chunk}
    if prefix:
        options["k_visible"] = torch.arange(chunks, device="cuda").int() * 60
    assert max(errors_of("hopper", [q, k, v, w], (cu_q, cu_k), **options)) < 1e-2


@needs_hopper
def test_hopper_causal_against_float64() -> None:
    lens = [300, 0, 1, 129]
    (q, k, v, w), cu_q, _ = packed(torch.float16, True, lens, lens)
    assert max(errors_of("hopper", [q, k.nan_to_num(), v.nan_to_num(), w], (cu_q, cu_q), causal=True)) < 1e-2


@needs_hopper
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_hopper_with_shared_rows_of_weights_and_causal_runs_against_float64(prefix: bool, causal: bool) -> None:
    lens = [300, 0, 70, 129]
    (q, k, v, _), cu_q, _ = packed(torch.bfloat16, False, lens, lens)
    chunk = torch.arange(q.shape[0], device="cuda") // 90 % 3  # rows 0, 1, 2, 0, ..: some runs end with a sample
    w = torch.randn(3, k.shape[0], 4, device="cuda").mul(4)
    options: dict[str, Any] = {"q_chunk": chunk, "causal": causal}
    if prefix:
        options["k_visible"] = torch.tensor([0, 70, 1000], device="cuda").int()
    assert max(errors_of("hopper", [q, k.nan_to_num(), v.nan_to_num(), w], (cu_q, cu_q), **options)) < 1e-2


@needs_hopper
def test_hopper_is_chosen_and_repeats() -> None:
    inputs, cu_q, cu_k = packed(torch.bfloat16, False, [900, 300, 700], [900, 300, 700])
    runs = []
    for _ in range(5):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out, lse = weighted_attention(*leaves, cu_q, cu_k, return_lse=True)
        (out.float().square().sum() + lse.sum()).backward()
        runs.append([out, lse, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64}
    assert choose(None, device=Machine.of(inputs[0].device), **options).name == "hopper"


@needs_hopper
@pytest.mark.parametrize("weighted", [False, True])
def test_flash4_against_float64(weighted: bool) -> None:
    pytest.importorskip("flash_attn.cute")
    (q, k, v, w), cu_q, cu_k = packed(torch.bfloat16, False, [300, 70, 129], [411, 5, 130])
    inputs = [q, k.nan_to_num(), v.nan_to_num()]
    results = []
    for backend, kind in (("flash4", None), ("reference", torch.float64)):
        leaves = [x.detach().clone().to(kind or x.dtype).requires_grad_() for x in inputs]
        weight = w.to(torch.promote_types(torch.float32, kind or torch.float32)) if weighted else None
        out, lse = weighted_attention(*leaves, weight, cu_q, cu_k, return_lse=True, backend=backend)
        (out.double().square().sum() + lse.double().sin().sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("strategy", ["gather", "owner"])
def test_class_on_cuda_equals_cpu_and_repeats(strategy: str) -> None:
    torch.manual_seed(1)
    tokens, lengths = torch.randint(0, 50, (5, 40)), torch.tensor([40, 0, 17, 1, 33])
    targets = torch.randint(0, 50, (5, 3))
    cutoffs = torch.randint(0, 41, (5, 3))
    results = []
    for device in ("cpu", "cuda", "cuda"):
        group = SSPGroup(None, device=device)
        table = ShardedTokenEmbedding(50, 32, group, dtype=torch.float64)
        attention = TokenizedAttention(5, 40, 1, table, group=group, num_heads=2, strategy=strategy, include_self=True)
        outs = []
        for options in ({}, {"target_cutoffs": cutoffs.to(device)}):
            out = attention(tokens.to(device), lengths.to(device), targets=targets.to(device), **options)
            out.sin().sum().backward()
            outs.append(out.detach().cpu())
        table.step()
        results.append([*outs, table.to_dense().cpu()])
    for cpu, first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, cpu, rtol=0, atol=1e-10)
        assert torch.equal(first, second)


def test_unique_space_on_cuda_equals_cpu() -> None:
    torch.manual_seed(2)
    tokens, lengths = torch.randint(0, 2**62, (64, 300)) % 97, torch.randint(0, 301, (64,))
    here, there = UniqueSpace.from_padded(tokens, lengths), UniqueSpace.from_padded(tokens.cuda(), lengths.cuda())
    for name in ("tokens", "cu_seqlens", "counts", "inverse"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu()), name


@pytest.mark.parametrize("wrong", [5, 2**40, -1])
def test_an_id_that_a_table_does_not_hold_ends_the_process(wrong: int) -> None:
    """As nn.Embedding's do: nothing of what it would have computed comes out."""
    program = (
        "import torch; from ta_plugin import ShardedTokenEmbedding; table = ShardedTokenEmbedding(5, 4, device='cuda')\n"
        f"for last in (4, {wrong}): print('sum', table(torch.tensor([1, last], device='cuda')).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and result.stdout.count("sum") == 1
    assert "out of bounds" in result.stderr or "device-side assert" in result.stderr, result.stderr


def test_recommender_trains_on_cuda(tmp_path: Path) -> None:
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{e % 30}\ti{(e * 7) % 40}\t{1 + e % 5}\t{1000 * e}" for e in range(900)]
    (tmp_path / "small.inter").write_text("\n".join(lines) + "\n")
    data = load_interactions(tmp_path / "small.inter")
    config = RecommenderConfig(data.n_items, data.n_actions, 16, recent_length=10, long_length=20, dim=32)
    trainer = RecommenderTrainer(
        data, config, tokens_are_items=True, num_negatives=7, learning_rate=0.01, group=SSPGroup(None, device="cuda")
    )
    losses = [trainer.train_step(step)[0] for step in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
