"""The token table inside Megatron: rows sharded over SSP, columns over TP, trained by Megatron's own DDP and optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ta_plugin.embedding import initial_rows, lookup
from ta_plugin.megatron.groups import ssp_group
from ta_plugin.megatron.plan import RowLayout
from ta_plugin.ops import expand
from ta_plugin.routing import PermutedRows, Route
from ta_plugin.unique_space import UniqueSpace


class SSPTokenEmbedding(nn.Module):
    """A (V, hidden) table of which each rank holds V / SSP rows, in permuted order, and hidden / TP columns of them.

    A rank asks the owners of its microbatch's distinct ids for their rows, once per id; gradients return the same way. The
    parameter carries `allreduce = False`, so that Megatron reduces it over the SSP group's replicas only.

    vocab_size:   ids must lie below it. The table has `divisible_by * ceil(vocab_size / divisible_by)` rows, whatever the SSP
                  size, so that a checkpoint loads under any SSP size that divides them
    seed:         rows start normal with deviation config.init_method_std; the same rows in every layout

    Raises ValueError when SSP does not divide the rows, or TP the hidden size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
        *,
        divisible_by: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.group = ssp_group(pg_collection)
        self.tp = pg_collection.tp
        self.table_rows = -(-vocab_size // divisible_by) * divisible_by
        if self.table_rows % self.group.size:
            raise ValueError(
                f"the table has {self.table_rows} rows (vocab_size {vocab_size} in multiples of divisible_by {divisible_by}), which "
                f"ssp size {self.group.size} does not divide; pass a divisible_by that is a multiple of {self.group.size}"
            )
        if config.hidden_size % self.tp.size():
            raise ValueError(
                f"hidden_size is {config.hidden_size}, which tensor parallel size {self.tp.size()} does not divide; change one of them"
            )
        self.owners = PermutedRows(self.table_rows, self.group.size)
        self.width = config.hidden_size // self.tp.size()
        self.weight = nn.Parameter(self._initial(seed))
        self.weight.allreduce = self.group.size == 1  # type: ignore[attr-defined]
        self.weight.tensor_model_parallel = self.tp.size() > 1  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 1, 1  # type: ignore[attr-defined]

    def forward(self, layout: RowLayout) -> Tensor:
        """Embeddings of a layout's rows, (local, 1, hidden), or this rank's share of them under sequence parallelism.

        Collective over SSP and TP, forward and backward.
        """
        columns = layout.pad(self.fetch(layout.tokens())).unsqueeze(1)
        rows = _GatherColumns.apply(columns, self.tp) if self.tp.size() > 1 else columns
        if self.config.sequence_parallel:
            rows = scatter_to_sequence_parallel_region(rows, group=self.tp)
        return rows.float() if self.config.fp32_residual_connection else rows

    def fetch(self, ids: Tensor) -> Tensor:
        """Ids (n,) int64 to their rows' columns of this TP rank, (n, hidden / TP). Collective over SSP."""
        distinct = UniqueSpace.from_packed(ids)
        owner = self.owners.owner_of(distinct.tokens)
        route = Route.build(owner, distinct.cu_seqlens, [1] * self.group.size, self.group)
        return expand(lookup(distinct.tokens, route, self.owned_rows, "embedding"), distinct.segments)

    def owned_rows(self, ids: Tensor) -> Tensor:
        """Rows (n, hidden / TP) of global ids (n,) that this rank owns, each once."""
        # a row that there is not, so that an id of another rank raises
        rows = self.owners.local_row(ids, self.group.rank, other=self.weight.shape[0])
        return self.weight.index_select(0, rows)

    def load_dense(self, table: Tensor) -> None:
        """Take this rank's part of a whole table (V, hidden) in order of ids; rows past V are left as they are."""
        ids = self._ids()
        known = ids < table.shape[0]
        with torch.no_grad():
            self.weight[known.to(self.weight.device)] = self._columns(table)[ids[known]].to(self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight as one (table_rows, hidden) tensor in permuted order, which any SSP and TP size may load."""
        ssp = (len(sharded_offsets), self.group.rank, self.group.size)
        tp = (len(sharded_offsets) + 1, self.tp.rank(), self.tp.size())
        replicas = self.group.replicas
        if self.group.group is None:  # unsharded: every data-parallel rank holds the same rows
            given = (metadata or {}).get("dp_cp_group")
            replicas = given or parallel_state.get_data_parallel_group(with_context_parallel=True)
        copy = replicas.rank() if replicas is not None else 0
        key = f"{prefix}weight"
        tensor = ShardedTensor.from_rank_offsets(
            key,
            self.weight,
            *sharded_offsets,
            ssp,
            tp,
            replica_id=(0, 0, copy),
            prepend_axis_num=len(sharded_offsets),
        )
        return {key: tensor}

    def extra_repr(self) -> str:
        return f"{self.vocab_size} ids, {self.weight.shape[0]} of {self.table_rows} rows, {self.group}"

    def _ids(self) -> Tensor:
        first = self.group.rank * self.owners.rows_per_rank
        return self.owners.ids_of_rows(torch.arange(first, first + self.owners.rows_per_rank))

    def _columns(self, rows: Tensor) -> Tensor:
        return rows[:, self.tp.rank() * self.width : (self.tp.rank() + 1) * self.width]

    def _initial(self, seed: int) -> Tensor:
        first = self.group.rank * self.owners.rows_per_rank
        last = first + self.owners.rows_per_rank
        rows = initial_rows(first, last, self.config.hidden_size, self.config.init_method_std, seed)
        on_cpu = self.config.use_cpu_initialization or not torch.cuda.is_available()
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        return self._columns(rows).to(device=device, dtype=self.config.params_dtype).contiguous()


class _GatherColumns(torch.autograd.Function):
    """Columns of every TP rank side by side; each rank's gradient holds all of them, so backward takes its own.

    Megatron's own asks torch.cuda for a device, which a CPU run lacks.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = columns.new_empty(group.size() * columns.shape[0], *columns.shape[1:])
        dist.all_gather_into_tensor(gathered, columns.contiguous(), group=group)
        return torch.cat(gathered.chunk(group.size()), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), -1)[ctx.group.rank()].contiguous(), None
