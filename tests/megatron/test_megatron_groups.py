"""SSP groups inside Megatron's grid of ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist
from layouts import Layout, megatron
from megatron.core import parallel_state
from ranks import RankPool

from ta_plugin.megatron import SSPGroups, SSPRanks, create_ssp_groups, ssp_group
from ta_plugin.megatron.groups import collection_of

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    "tensor, pipeline, context, size", [(1, 1, 1, 4), (2, 1, 1, 4), (2, 2, 1, 2), (1, 2, 2, 4), (2, 1, 2, 2)]
)
def test_every_rank_is_in_one_group_of_each_kind(tensor: int, pipeline: int, context: int, size: int) -> None:
    ranks = SSPRanks.of_sizes(size, world=16, tensor=tensor, pipeline=pipeline, context=context)
    for lists, members in (
        (ranks.ssp, size),
        (ranks.replicas, 16 // (tensor * pipeline * size)),
        (ranks.model, tensor * pipeline * size),
    ):
        assert sorted(r for one in lists for r in one) == list(range(16))
        assert {len(one) for one in lists} == {members}
    grid = parallel_state.RankGenerator(
        tp=tensor, ep=1, dp=16 // (tensor * pipeline * context), pp=pipeline, cp=context, order="tp-cp-ep-dp-pp"
    )
    shared = [set(peers) for peers in grid.get_ranks("dp-cp")]
    for one in ranks.ssp:  # at fixed TP and PP
        assert any(peers.issuperset(one) for peers in shared)


@pytest.mark.parametrize("size", [0, 3, 8])
def test_sizes_that_do_not_divide_name_those_that_do(size: int) -> None:
    with pytest.raises(ValueError, match=rf"ssp size is {size}.*4 ranks.*\[1, 2, 4\]"):
        SSPRanks.of_sizes(size, world=8, tensor=2)


def test_a_grid_that_does_not_fit_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 ranks are no multiple of .* 3 x 1 x 1"):
        SSPRanks.of_sizes(1, world=8, tensor=3)


def attached(layout: Layout) -> dict[str, list[int]]:
    with megatron(layout) as groups:
        names = ("ssp", "ssp_replicas", "expt_dp", "intra_expt_dp", "tp_ep_pp", "tp_ep_pp_with_egtp_remat")
        found = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in names}
        view = ssp_group(groups)
        assert view.data_parallel_size == parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return found


def test_a_collection_carries_the_groups(megatron_ranks: Callable[[int], RankPool]) -> None:
    by_rank = megatron_ranks(4).run(attached, Layout(ssp=2, pp=2))
    assert [g["ssp"] for g in by_rank] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g["tp_ep_pp"] for g in by_rank] == [[0, 1, 2, 3]] * 4
    by_rank = megatron_ranks(4).run(attached, Layout(ssp=2))
    assert [g["ssp_replicas"] for g in by_rank] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    for groups in by_rank:
        assert groups["expt_dp"] == groups["intra_expt_dp"] == groups["ssp_replicas"]
        assert groups["tp_ep_pp"] == groups["tp_ep_pp_with_egtp_remat"] == groups["ssp"]


def created_before() -> list[list[int]]:
    made = create_ssp_groups(2, tensor=2)
    return [dist.get_process_group_ranks(g) for g in (made.ssp, made.replicas, made.model)]


def test_groups_may_be_created_before_megatron(megatron_ranks: Callable[[int], RankPool]) -> None:
    assert megatron_ranks(4).run(created_before)[1] == [[1, 3], [1], [0, 1, 2, 3]]


def beside_other_experts() -> str:
    try:
        with megatron(Layout(ssp=4, ep=2)):
            return "accepted"
    except ValueError as refusal:
        return str(refusal)


def test_experts_and_rows_share_one_layout(megatron_ranks: Callable[[int], RankPool]) -> None:
    for message in megatron_ranks(4).run(beside_other_experts):
        assert "ssp size is 4 beside expert parallel size 2" in message


def test_groups_that_were_not_attached_say_how() -> None:
    groups = SSPGroups(*[object()] * 3)  # type: ignore[arg-type]
    for take in (collection_of, ssp_group):
        with pytest.raises(ValueError, match=r"pass create_ssp_groups\(size\)\.attach\(\)"):
            take(groups)  # type: ignore[arg-type]


def test_without_groups_what_to_call_is_said() -> None:
    with pytest.raises(ValueError, match=r"call parallel_state\.initialize_model_parallel first"):
        collection_of(None)
