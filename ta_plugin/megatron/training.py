"""What a script needs that trains through megatron.training's pretrain(): its groups, with SSP among them.

pretrain() keeps groups that exist already, and reduces rows sharded over SSP by its expert-parallel groups, which have the same layout.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets import utils as data_sets
from megatron.core.process_groups_config import ProcessGroupCollection

from ta_plugin.megatron.groups import SSPRanks


def initialize_groups(args: Namespace) -> None:
    """torch.distributed and Megatron's groups, SSP of `args.ta_ssp_size` in the place of expert parallelism; before pretrain().

    args: Megatron's, validated, with the group of `add_ta_arguments`. Every rank calls it.

    Raises ValueError when the SSP size divides no DP x CP (with the sizes that do), or differs from the expert parallel size.
    """
    ssp, experts = args.ta_ssp_size, args.expert_model_parallel_size
    if experts not in (1, ssp):
        raise ValueError(
            f"ta_ssp_size is {ssp} beside expert_model_parallel_size {experts}; rows and experts reduce over the same groups, so make "
            "them equal"
        )
    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    SSPRanks.of_sizes(
        ssp, world=args.world_size, tensor=tensor, pipeline=pipeline, context=args.context_parallel_size, order=order
    )
    if not dist.is_initialized():
        if torch.cuda.is_available() and args.distributed_backend == "nccl":
            torch.cuda.set_device(args.local_rank)
        dist.init_process_group(args.distributed_backend)
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=ssp,
        expert_tensor_parallel_size=tensor,
        order=order,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )


def ssp_collection() -> ProcessGroupCollection:
    """Megatron's groups after `initialize_groups`, for a TokenizedModel: the expert-parallel group as SSP."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.ssp, groups.ssp_replicas = groups.ep, groups.expt_dp
    return groups


@contextmanager
def helpers_as_shipped() -> Iterator[None]:
    """Inside, pretrain() does not build the data sets' C++ helpers where the installed wheel ships them built, but no Makefile.

    It would call make, which fails, and exit. Where there is a Makefile, as in a checkout of Megatron-LM, nothing changes.
    """
    folder = Path(data_sets.__file__).parent
    shipped = not (folder / "Makefile").exists() and find_spec("megatron.core.datasets.helpers_cpp") is not None
    with patch.object(data_sets, "compile_helpers", lambda: None) if shipped else nullcontext():
        yield
