"""The SSP group inside Megatron-core's grid of ranks, and the groups that rows owned by it reduce over."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from ta_plugin.parallel import SSPGroup

_ORDER = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel


@dataclass(frozen=True)
class SSPRanks:
    """Which global ranks form each kind of group; a partition of all ranks by each.

    ssp:      ranks that own different rows of one table: consecutive ranks of a DP x CP list at fixed TP and PP
    replicas: ranks that own the same rows, over which their gradients reduce
    model:    TP x SSP x PP, over which the squared norm of the rows' gradients is summed
    """

    ssp: list[list[int]]
    replicas: list[list[int]]
    model: list[list[int]]

    @classmethod
    def of_sizes(
        cls, size: int, *, world: int, tensor: int = 1, pipeline: int = 1, context: int = 1, order: str = _ORDER
    ) -> SSPRanks:
        """Divide `world` ranks as expert parallelism of `size` would. Creates no group, so it may run anywhere.

        Raises ValueError when tensor * pipeline * context does not divide the world, or `size` does not divide DP x CP.
        """
        if world % (tensor * pipeline * context):
            raise ValueError(
                f"{world} ranks are no multiple of tensor x pipeline x context parallel size = "
                f"{tensor} x {pipeline} x {context}; change one of them"
            )
        shared = world // (tensor * pipeline)
        if size < 1 or shared % size:
            sizes = [s for s in range(1, shared + 1) if shared % s == 0]
            raise ValueError(
                f"ssp size is {size}, which does not divide the {shared} ranks of data x context parallelism; "
                f"choose one of {sizes}"
            )
        grid = parallel_state.RankGenerator(tp=tensor, ep=size, dp=shared // size, pp=pipeline, cp=1, order=order)
        return cls(grid.get_ranks("ep"), grid.get_ranks("dp"), grid.get_ranks("tp-ep-pp"))


@dataclass(frozen=True)
class SSPGroups:
    """This rank's process groups of an `SSPRanks` layout; made by `create_ssp_groups`."""

    ssp: ProcessGroup
    replicas: ProcessGroup
    model: ProcessGroup

    def attach(self, pg_collection: ProcessGroupCollection | None = None) -> ProcessGroupCollection:
        """Put the groups where layers, DDP and optimizer look for them, and return the collection.

        pg_collection: by default the one of `initialize_model_parallel`. It gains `ssp` and `ssp_replicas`; parameters with
        `allreduce = False` then reduce over the replicas. Pass it to the model, to DistributedDataParallel, and to
        get_megatron_optimizer together with use_gloo_process_groups=False.

        Raises ValueError when expert parallelism lays its experts out in another way than SSP its rows: both use the same
        gradient bucket.
        """
        groups = collection_of(pg_collection)
        experts = getattr(groups, "ep", None)
        if experts is not None and experts.size() > 1:
            same = _ranks(experts) == _ranks(self.ssp) and _ranks(groups.expt_dp) == _ranks(self.replicas)
            if not same or _ranks(groups.tp_ep_pp) != _ranks(self.model):
                raise ValueError(
                    f"ssp size is {self.ssp.size()} beside expert parallel size {experts.size()}; Megatron reduces experts and "
                    "sharded rows over one group, so make the ssp size equal to expert_model_parallel_size, and "
                    "expert_tensor_parallel_size equal to tensor_model_parallel_size"
                )
        groups.ssp = self.ssp
        groups.ssp_replicas = self.replicas
        groups.expt_dp = groups.intra_expt_dp = self.replicas
        groups.tp_ep_pp = self.model
        groups.tp_ep_pp_with_egtp_remat = self.model  # what 0.19 reads instead; a wrong norm without it
        return groups


def create_ssp_groups(
    size: int,
    *,
    tensor: int | None = None,
    pipeline: int | None = None,
    context: int | None = None,
    order: str = _ORDER,
) -> SSPGroups:
    """Create the SSP groups; every rank calls it, in the same order as its other group creations.

    After `initialize_model_parallel` the sizes are read from it; before, pass tensor, pipeline and context parallel sizes.
    order: what `initialize_model_parallel` was or will be given

    Raises ValueError for sizes that do not divide (with those that do) and for an order other than Megatron's.
    """
    known = parallel_state.is_initialized()
    if known:
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        context = parallel_state.get_context_parallel_world_size()
    ranks = SSPRanks.of_sizes(
        size,
        world=dist.get_world_size(),
        tensor=tensor or 1,
        pipeline=pipeline or 1,
        context=context or 1,
        order=order,
    )
    if known:
        _check_order(ranks, order)
    made = [_create(lists, name) for lists, name in zip((ranks.ssp, ranks.replicas, ranks.model), _NAMES, strict=True)]
    return SSPGroups(*made)


_NAMES = ("SSP", "SSP_REPLICAS", "TP_SSP_PP")


def collection_of(pg_collection: ProcessGroupCollection | None) -> ProcessGroupCollection:
    """The collection itself, or the one of `initialize_model_parallel`. Raises ValueError when there is neither."""
    _check_attached(pg_collection)
    if pg_collection is None and not parallel_state.is_initialized():
        raise ValueError(
            "pg_collection is None, and Megatron has no groups yet; call parallel_state.initialize_model_parallel first"
        )
    return pg_collection or ProcessGroupCollection.use_mpu_process_groups()


def ssp_group(pg_collection: ProcessGroupCollection) -> SSPGroup:
    """The core's view of a collection's SSP group: one rank where none is attached."""
    _check_attached(pg_collection)
    group = getattr(pg_collection, "ssp", None)
    if group is None:
        return SSPGroup(None)
    replicas = pg_collection.ssp_replicas
    return SSPGroup(group, replicas=replicas if replicas.size() > 1 else None)


def _check_attached(pg_collection: object) -> None:
    if isinstance(pg_collection, SSPGroups):
        raise ValueError("pg_collection is what create_ssp_groups returned; pass create_ssp_groups(size).attach()")


def _create(rank_lists: list[list[int]], name: str) -> ProcessGroup:
    mine = None
    for ranks in rank_lists:  # every rank creates every group, in one order
        group = parallel_state.create_group(ranks, group_desc=name)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


def _check_order(ranks: SSPRanks, order: str) -> None:
    peers = set(_ranks(parallel_state.get_data_parallel_group(with_context_parallel=True)))
    mine = next(ranks_of for ranks_of in ranks.ssp if dist.get_rank() in ranks_of)
    if not peers.issuperset(mine):
        raise ValueError(
            f"order is {order!r} with ssp ranks {mine}, but initialize_model_parallel made {sorted(peers)} data parallel to each other; "
            "pass the order that it was given, and keep 'cp', 'ep' and 'dp' next to each other in it"
        )


def _ranks(group: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)
