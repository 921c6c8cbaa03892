"""Target attention compiled for every device there is, against loops over queries and heads in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from target_attention_cases import WEIGHTS, check, draw, gradients, oracle, run, supported
from torch import Tensor

from ta_plugin.attention import target_attention
from ta_plugin.ops import Segments
from ta_plugin.ops.target import RowsInPlace


@given(data=st.data())
@settings(max_examples=80)
def test_random_shapes(device: str, data: st.DataObject) -> None:
    samples = data.draw(st.integers(0, 4))
    lengths = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    keys = st.lists(st.integers(0, 9), min_size=samples, max_size=samples)
    heads_kv = data.draw(st.integers(1, 3))
    normaliser = data.draw(st.sampled_from(["softmax", "none"]))
    case = draw(
        device,
        data.draw(lengths),
        data.draw(keys),
        table=data.draw(st.integers(1, 6)),
        heads=heads_kv * data.draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        dim=8 * data.draw(st.integers(1, 4)) if device == "cuda" else data.draw(st.integers(1, 9)),
        dtype=data.draw(st.sampled_from([d for d in supported(device) if d in (torch.float32, torch.float64)])),
        one_table=data.draw(st.booleans()),
        weights=data.draw(st.sampled_from(WEIGHTS)),
        normaliser=normaliser,
        activation=data.draw(st.sampled_from([None, F.silu])) if normaliser == "none" else None,
        absent=0.3,
        seed=data.draw(st.integers(0, 1 << 20)),
    )
    check(case)


@pytest.mark.parametrize("one_table", [True, False], ids=["one_table", "two_tables"])
@pytest.mark.parametrize(
    ("heads", "heads_kv", "targets", "dim"),
    [(4, 1, 1, 128), (4, 2, 3, 64), (1, 1, 1, 40), (4, 1, 8, 96), (8, 1, 5, 128), (3, 1, 2, 256), (4, 4, 1, 128)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sizes_and_types(
    device: str, dtype: torch.dtype, heads: int, heads_kv: int, targets: int, dim: int, one_table: bool
) -> None:
    """Several chunks of keys to a sample, every width of the kernels, more query rows than a block takes at once."""
    if dtype not in supported(device):
        pytest.skip(f"{dtype} runs on the CPU")
    if device == "cuda" and dtype == torch.float32 and not one_table and dim > 128:
        pytest.skip("two float32 tables of this width do not fit shared memory")
    keys = [700, 0, 33, 1] if device == "cuda" else [130, 0, 33, 1]
    weights = WEIGHTS[(heads + targets + dim) % len(WEIGHTS)]
    case = draw(
        device, [targets, 1, targets, max(targets - 1, 0)], keys, table=400, heads=heads, heads_kv=heads_kv, dim=dim,
        dtype=dtype, one_table=one_table, weights=weights, absent=0.1,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("samples", [300, 600, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_samples(device: str, dtype: torch.dtype, samples: int) -> None:
    """The more samples, as of several ranks, the narrower the slice of their query rows that shared memory holds in backward."""
    keys = [9 * i % 5 for i in range(samples)]
    check(draw(device, [1] * samples, keys, table=samples // 2, dim=72, dtype=dtype, weights=None))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activation", [None, F.silu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_normaliser(device: str, dtype: torch.dtype, activation: Any, weights: str | None) -> None:
    case = draw(
        device, [2, 0, 1], [70, 5, 0], dtype=dtype, normaliser="none", activation=activation, weights=weights, heads_kv=2
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", [1, 9, 2000])
def test_members_of_a_row(device: str, dtype: torch.dtype, table: int) -> None:
    """One hot token whose row has all members (on CUDA over several blocks of them); each row few; nearly every row one or none."""
    keys = [500, 400, 0, 1000, 7] if device == "cuda" else [90, 40, 0, 100, 7]
    case = draw(device, [1] * 5, keys, table=table, dtype=dtype, heads=2, dim=32)
    if table == 2000:
        order = torch.randperm(table, generator=torch.Generator().manual_seed(1))
        case = case._replace(rows=order[: sum(keys)].to(device))
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("samples", "heads"), [(300, 4), (300, 8), (1500, 4)])
def test_few_query_rows_in_many_samples(device: str, dtype: torch.dtype, samples: int, heads: int) -> None:
    """On CUDA with all samples' queries in shared memory, and with more of them than that holds; rows of one and of all samples."""
    if device == "cpu":
        samples //= 10
    lengths = [n % 7 for n in range(samples)]
    case = draw(device, [n % 3 != 2 for n in range(samples)], lengths, table=900, heads=heads, dim=40, dtype=dtype)
    case.rows[torch.tensor([0, *lengths]).cumsum(0)[:-1][[n > 0 for n in lengths]].to(device)] = (
        5  # one token everywhere
    )
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "heads_kv"), [(4, 1), (12, 1), (4, 2)])
@pytest.mark.parametrize("weights", ["key", "pair_head"])
def test_rows_in_place(device: str, dtype: torch.dtype, heads: int, heads_kv: int, weights: str) -> None:
    """The gradient of the rows that are named, and of no others, to the bit that of the whole table."""
    targets = 2 if heads < 12 else 1
    case = draw(
        device, [targets, 1, 0, targets], [300, 41, 9, 0], table=500, heads=heads, heads_kv=heads_kv, dtype=dtype, weights=weights
    )  # fmt: skip
    whole = run(case)
    distinct, index = case.rows.unique(return_inverse=True)
    recorded: list[Tensor] = []
    named = case._replace(
        rows=RowsInPlace(case.rows, Segments.from_index(index, distinct.numel() + 3), recorded.append)
    )  # type: ignore[arg-type]
    results = run(named._replace(k_table=case.k_table.clone()))
    assert "dk" not in results  # the table is outside of the graph
    assert len(recorded) == 1 and not recorded[0][distinct.numel() :].any()
    assert torch.equal(recorded[0][: distinct.numel()], whole["dk"][distinct])
    assert all(torch.equal(x, whole[name]) for name, x in results.items())
    with torch.no_grad():
        silent = target_attention(
            case.q, case.k_table, None, named.rows, *case.bounds, case.weight, q_chunk=case.q_chunk, backend="compiled"
        )
    assert torch.equal(silent, whole["out"]) and len(recorded) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [1, 5])
@pytest.mark.parametrize("one_table", [True, False])
def test_places_behind_the_keys_add_nothing(device: str, dtype: torch.dtype, targets: int, one_table: bool) -> None:
    """As a bounded space leaves them: more places than keys, and those left over name key 0, whose row has members of its own."""
    case = draw(
        device,
        [targets, targets, 1],
        [300, 20, 7],
        table=12,
        heads_kv=2,
        one_table=one_table,
        dtype=dtype,
        weights=None,
    )
    segments = Segments.from_index(case.rows, 12)
    places = (F.pad(x, (0, 700)) for x in (segments.index, segments.order))
    found = run(case._replace(rows=Segments(*places, segments.offsets)))  # type: ignore[arg-type]
    for name, expected in run(case).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([], []), ([0, 0], [0, 0]), ([2, 1], [0, 0]), ([0, 0], [3, 5])])
@pytest.mark.parametrize("one_table", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_attend(
    device: str, dtype: torch.dtype, lengths_q: list[int], lengths_k: list[int], one_table: bool
) -> None:
    case = draw(device, lengths_q, lengths_k, dtype=dtype, one_table=one_table)
    results = run(case)
    lse = results.pop("lse")
    assert lse.shape == case.q.shape[:2] and (lse == -torch.inf).all()
    assert all((x == 0).all() for x in results.values())
    assert results["dk"].shape == case.k_table.shape


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_the_samples_that_name_it(device: str, dtype: torch.dtype, weights: str | None) -> None:
    case = draw(device, [2, 1, 3], [37, 20, 41], table=60, dtype=dtype, weights=weights, heads_kv=2, one_table=False)
    samples = torch.repeat_interleave(torch.arange(3), torch.tensor(case.lengths_k)).to(device)
    case.rows[case.rows == 7] = 8  # row 7: sample 1 alone, and where weights can say so, absent from sample 0
    case.rows[samples.eq(1).nonzero()[3]] = 7
    if case.weight is not None:
        case.rows[5] = 7
        (case.weight if case.q_chunk is None else case.weight.movedim(1, 0))[5] = -torch.inf
    clean = run(case)
    assert case.v_table is not None
    case.k_table[7], case.v_table[7] = torch.nan, torch.nan
    dirty = run(case)
    of_query = torch.repeat_interleave(torch.arange(3), torch.tensor(case.lengths_q)).to(device)
    for name in ("out", "lse", "dq"):
        assert torch.equal(dirty[name][of_query != 1], clean[name][of_query != 1]), name
        assert dirty[name][of_query == 1].isnan().all(), name
    untouched = torch.ones(60, dtype=torch.bool, device=device).index_fill(0, case.rows[samples == 1], False)
    for name in ("dk", "dv"):
        assert torch.equal(dirty[name][untouched], clean[name][untouched]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "heads_kv", "dim"), [(8, 1, 128), (16, 2, 128), (9, 1, 96), (5, 1, 128)])
@pytest.mark.parametrize("weights", [None, "key"])
def test_many_query_rows(
    device: str, dtype: torch.dtype, heads: int, heads_kv: int, dim: int, weights: str | None
) -> None:
    """20 to 36 rows to a sample, scores that grow from key to key, chunks of several lengths, another sample's NaN; bit for bit again."""
    keys = [900, 0, 33, 64, 1, 129] if device == "cuda" else [90, 0, 33, 64, 1, 12]
    case = draw(
        device, [4, 1, 3, 0, 4, 2], keys, table=400, heads=heads, heads_kv=heads_kv, dim=dim, dtype=dtype, weights=weights, absent=0.2
    )  # fmt: skip
    case.k_table.mul_(torch.linspace(0.1, 2, 400, device=device)[:, None, None])
    case.rows[: keys[0]] = case.rows[: keys[0]].sort().values
    case.rows[case.rows == 7] = 8
    clean = run(case)
    check(case, clean)
    case.rows[keys[0]] = 7  # of the sample with 33 keys
    if case.weight is not None:
        case.weight[keys[0]] = 0.0
        case.weight[70], case.rows[70] = -torch.inf, 7
    clean = run(case)
    case.k_table[7] = torch.nan
    dirty = run(case)
    of_query = torch.repeat_interleave(torch.arange(6), torch.tensor([4, 1, 3, 0, 4, 2])).to(device)
    for name in ("out", "lse", "dq"):
        assert torch.equal(dirty[name][of_query != 2], clean[name][of_query != 2]), name
        assert dirty[name][of_query == 2].isnan().all(), name
    case.k_table[7] = 1.0
    first = run(case)
    for _ in range(5):
        again = run(case)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3, 4, 7])
@pytest.mark.parametrize("sick", [0, 2])
def test_nan_of_a_query_stays_with_its_samples_keys(device: str, dtype: torch.dtype, heads: int, sick: int) -> None:
    """With few query rows CUDA adds up gradients of several samples in one product: a NaN must not meet another's coefficient of 0."""
    case = draw(device, [1, 1, 1], [37, 20, 41], table=60, dtype=dtype, heads=heads)
    clean = run(case)
    case.q[sick] = torch.nan
    dirty = run(case)
    named = torch.zeros(60, dtype=torch.bool, device=device)
    named[case.rows[torch.repeat_interleave(torch.arange(3), torch.tensor(case.lengths_k)).to(device) == sick]] = True
    assert named.any() and not named.all()
    assert dirty["dk"][named].isnan().all() and torch.equal(dirty["dk"][~named], clean["dk"][~named])
    healthy = [b for b in range(3) if b != sick]
    assert dirty["dq"][sick].isnan().all() and torch.equal(dirty["dq"][healthy], clean["dq"][healthy])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_overflow_reaches_its_samples_keys_alone(device: str, dtype: torch.dtype, heads: int) -> None:
    """A loss scale that is too large shows in the gradient of every key of its sample, in all columns, and of no other."""
    case = draw(device, [1, 1, 1], [37, 20, 41], table=60, dtype=dtype, heads=heads)
    clean = run(case)
    case.grads[0][1, heads - 1, 5] = torch.inf
    dirty = run(case)
    named = torch.zeros(60, dtype=torch.bool, device=device)
    named[case.rows[37:57]] = True
    assert not dirty["dk"][named].isfinite().any() and torch.equal(dirty["dk"][~named], clean["dk"][~named])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_targets_with_cutoffs(device: str, dtype: torch.dtype, heads_kv: int) -> None:
    """Later targets see more keys, so that warps of different targets disagree about which are there; none sees the NaN."""
    case = draw(
        device, [8, 3], [90, 40], table=70, heads=8, heads_kv=heads_kv, dtype=dtype, weights="pair", one_table=False
    )
    cutoffs = torch.arange(1, 9, device=device).unsqueeze(1) * 10
    case.weight[torch.arange(130, device=device) >= cutoffs] = -torch.inf  # type: ignore[index]
    case.rows[case.rows == 7] = 8
    case.rows[80:] = 7
    clean = run(case)
    check(case, clean)
    assert case.v_table is not None
    case.k_table[7], case.v_table[7] = torch.nan, torch.nan
    dirty = run(case)
    assert all(torch.equal(dirty[name], x) for name, x in clean.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_repeats_to_the_bit(device: str, dtype: torch.dtype, heads_kv: int) -> None:
    keys = [900, 30, 0, 500] if device == "cuda" else [90, 30, 0, 50]
    case = draw(device, [2, 9, 1, 1], keys, dtype=dtype, heads_kv=heads_kv, weights="head", absent=0.1)
    first = run(case)
    for _ in range(20):
        again = run(case)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.parametrize("normaliser", ["softmax", "none"])
def test_operators_in_torch_and_expanded_agree(device: str, normaliser: str, plain: Any) -> None:
    case = draw(device, [2, 0, 3], [40, 9, 0], heads_kv=2, one_table=False, weights="pair_head", normaliser=normaliser)
    check(case, run(case, "expanded"))
    segments = Segments.from_index(case.rows, case.k_table.shape[0])
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k_table, case.v_table, case.weight)]  # type: ignore[union-attr]
    out, lse = plain("target_attention")(
        *leaves[:3], segments.index, None, segments.order, segments.offsets, *case.bounds, leaves[3], case.q_chunk, 3,
        case.q.shape[2] ** -0.5, normaliser
    )  # fmt: skip
    check(case, gradients(case, leaves, out, lse if normaliser == "softmax" else None))


def test_absent_gradients_and_views(device: str) -> None:
    """Gradient through lse alone, through a part of the inputs, and inputs that are views."""
    case = draw(device, [2, 1], [30, 20], dim=32)
    wide = case.q.repeat(1, 1, 2)[..., :32].requires_grad_()
    out, lse = target_attention(
        wide, case.k_table, None, case.rows, *case.bounds, case.weight, return_lse=True, backend="compiled"
    )
    assert torch.equal(out.detach(), run(case)["out"])
    (grad,) = torch.autograd.grad(lse.sum(), [wide])
    exact = case._replace(grads=(torch.zeros_like(case.q), torch.ones_like(case.grads[1])))
    torch.testing.assert_close(grad, oracle(exact)["dq"].to(grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, "pair_head"])
@pytest.mark.parametrize("one_table", [True, False])
def test_torch_accepts_the_operators(device: str, compiled: Any, one_table: bool, weights: str | None) -> None:
    case = draw(device, [2, 0, 1], [6, 3, 4], dim=8, one_table=one_table, weights=weights, table=9)
    inputs = [None if x is None else x.requires_grad_() for x in (case.q, case.k_table, case.v_table)]
    weight = None if case.weight is None else case.weight.requires_grad_()
    segments = Segments.from_index(case.rows, 9)
    rows = (segments.index, None, segments.order, segments.offsets)
    arguments = (*inputs, *rows, *case.bounds, weight, case.q_chunk, 2, 0.3, "softmax")
    torch.library.opcheck(compiled("target_attention").default, arguments)
    out, lse = compiled("target_attention")(*arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in (*case.grads, *arguments, out, lse)]
    torch.library.opcheck(compiled("target_attention_backward").default, (*detached, weights is not None, 0))


def test_compiles_whole(device: str) -> None:
    case = draw(device, [2, 1], [6, 4], dim=8, table=9)
    segments = Segments.from_index(case.rows, 9)

    def attend(q: Tensor, table: Tensor) -> Tensor:
        return target_attention(q, table, None, segments, *case.bounds, case.weight, max_seqlen_q=2, backend="compiled")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.q, case.k_table), attend(case.q, case.k_table))


IN_PLACE = RowsInPlace(
    torch.zeros(10, dtype=torch.int64), Segments.from_index(torch.zeros(10, dtype=torch.int64), 1), None
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"q": torch.zeros(3, 4)}, "q is"),
        ({"k_table": torch.zeros(23, 1, 9)}, "k_table has shape"),
        ({"v_table": torch.zeros(22, 1, 8)}, "v_table has shape"),
        ({"k_table": torch.zeros(23, 3, 8)}, "the second must divide the first"),
        ({"rows": torch.zeros(10)}, "rows is"),
        ({"rows": Segments.from_index(torch.zeros(10, dtype=torch.int64), 5)}, "rows map onto 5"),
        ({"cu_seqlens_k": torch.tensor([0, 10], dtype=torch.int32)}, "pass the same samples"),
        ({"weight": torch.zeros(9)}, "weight has shape"),
        ({"weight": torch.zeros(10, dtype=torch.bfloat16)}, "bf16 cannot tell"),
        ({"normaliser": "sigmoid"}, "normaliser is"),
        ({"activation": F.silu}, "activation is given"),
        ({"q_chunk": torch.zeros(2, dtype=torch.int64)}, "q_chunk has shape"),
        ({"backend": "flash"}, "choose 'compiled', 'expanded'"),
        ({"normaliser": "none", "activation": F.relu, "backend": "compiled"}, "no activation but SiLU"),
        ({"v_table": torch.zeros(23, 1, 4), "backend": "compiled"}, "equal head dims"),
        ({"rows": IN_PLACE, "v_table": torch.zeros(23, 1, 8)}, "v_table is given with rows in place"),
        ({"rows": IN_PLACE, "backend": "expanded"}, "rows are read in place by backend 'compiled'"),
        ({"q": torch.zeros(3, 4, 8).double(), "backend": "compiled"}, "q is torch.float64, k_table"),
        ({"rows": torch.full((10,), 23), "backend": "compiled"}, r"rows\[0\] is 23 of 23"),
    ],
)
def test_wrong_arguments_are_named(device: str, change: dict[str, Any], expected: str) -> None:
    if device != "cpu":
        pytest.skip("checked before any kernel; a row beyond the table by the CPU kernel alone")
    case = draw("cpu", [2, 1], [6, 4], dim=8)
    arguments: dict[str, Any] = {"q": case.q, "k_table": case.k_table, "v_table": None, "rows": case.rows}
    arguments |= {"cu_seqlens_q": case.bounds[0], "cu_seqlens_k": case.bounds[1]} | change
    if isinstance(change.get("rows"), Tensor) and "backend" in change:
        arguments["rows"] = Segments(change["rows"], torch.arange(10), torch.arange(24).clamp(max=10))
    with pytest.raises((ValueError, IndexError), match=expected):
        target_attention(**arguments)
