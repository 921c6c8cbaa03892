"""Megatron-core's process groups under the names DeepSpeed asks for."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class MegatronMPU:
    """`mpu` of `initialize` for layers of Megatron-core: wraps its `parallel_state` module.

    Megatron-core no longer has a "model parallel" group; what DeepSpeed means by it are the tensor-parallel ranks.
    """

    def __init__(self, parallel_state: Any) -> None:
        self._state = parallel_state

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also keeps copy and pickle from asking forever
            raise AttributeError(name)
        return getattr(self._state, name)

    def get_model_parallel_world_size(self) -> int:
        return self._state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return self._state.get_tensor_model_parallel_rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._state.get_tensor_model_parallel_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(self._state.get_data_parallel_group())
