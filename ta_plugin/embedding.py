"""Looking tokens up where they are owned: the `embedding_fn` protocol and a table sharded by rows over the group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ta_plugin.checks import check_int64
from ta_plugin.ops import segment_sum
from ta_plugin.parallel import SSPGroup, all_gather_rows, exchange_header
from ta_plugin.routing import HashOwners, Owners, PermutedRows, Route
from ta_plugin.row_optimizers import RowOptimizer, RowWiseAdagrad
from ta_plugin.unique_space import UniqueSpace

_INIT_BLOCK = 4096  # rows that share one random stream: small enough to draw a shard without drawing the table
_SEARCHED = 2**20  # ids among which every rank should own one


class EmbeddingFn(Protocol):
    """What `TokenizedAttention` asks of an embedding: nn.Embedding, ShardedTokenEmbedding, FBGEMM, TorchRec, ...

    It is called with global ids that this rank owns, (n,) int64, each once, and returns (n, D) floating; with no ids it
    returns (0, D), differentiable like the rest, so that every rank reaches the backward of the collectives. If it has a method
    `owner_of(ids)`, that decides ownership; otherwise a hash of the id does.

    Kernels of target attention can read rows where they lie instead of asking for a copy of each. An embedding lets them by two more
    methods, if it says how many ids it has (`vocab_size`): a wrong id would read some row. `in_place(ids)` gives its rows as a
    contiguous tensor (R, D), as a call would give them, and which of them the owned ids (n,) have, which may repeat: (n,) int64.
    `record(rows, grad)` takes the gradient (I, D) of distinct rows (I,) once per backward, spare entries with gradient 0 among them;
    the tensor must not be written to before. In a `CapturedStep` `record` is called on a stream that joins when backward ends. An
    attribute `trainable` that is False says that no gradient is wanted. Over several ranks `in_place` needs `owner_of`: nobody else
    knows which ids its rows are for. Where every rank holds the whole table, that of `ta_plugin.routing.HashOwners(ranks)` will do.
    `in_place` may be None, as if it were not there.
    """

    def __call__(self, ids: Tensor, /) -> Tensor: ...


class SharedEmbedding:
    """A table for several modules, none of which registers it: its owner saves and steps it once."""

    def __init__(self, table: EmbeddingFn) -> None:
        self.table = table
        self.embedding_dim: int | None = getattr(table, "embedding_dim", None)
        self.vocab_size = vocab_size_of(table)

    def __getattr__(self, name: str) -> Any:
        if name in ("owner_of", "in_place", "record"):
            return getattr(self.table, name)  # as it is now: an engine may take `in_place` away
        raise AttributeError(name)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    @property
    def trainable(self) -> bool:
        return getattr(self.table, "trainable", True)


def vocab_size_of(embedding_fn: EmbeddingFn) -> int | None:
    """How many ids an embedding has, where it says so (ours and nn.Embedding do); None for open id spaces."""
    return getattr(embedding_fn, "vocab_size", None) or getattr(embedding_fn, "num_embeddings", None)


def owners_of(embedding_fn: EmbeddingFn, num_ranks: int) -> Owners:
    """The embedding's own ownership where it has one, else a hash of the id."""
    return embedding_fn if hasattr(embedding_fn, "owner_of") else HashOwners(num_ranks)  # type: ignore[return-value]


def reads_in_place(embedding_fn: EmbeddingFn) -> bool:
    """Whether an embedding lets its rows be read where they lie."""
    return getattr(embedding_fn, "in_place", None) is not None


def check_owners(embedding_fn: EmbeddingFn, num_ranks: int) -> None:
    """Raise ValueError where rows would be read in place, on several ranks, at owners that the embedding did not name."""
    if num_ranks > 1 and reads_in_place(embedding_fn) and not hasattr(embedding_fn, "owner_of"):
        raise ValueError(
            f"embedding_fn is a {type(embedding_fn).__name__} with in_place and without owner_of, on {num_ranks} ranks: a rank would read "
            "rows for ids that it may not hold; give it the table's owner_of, or, where every rank holds the whole table, "
            f"ta_plugin.routing.HashOwners({num_ranks}).owner_of"
        )


def owned_id(embedding_fn: EmbeddingFn, vocab_size: int | None, group: SSPGroup) -> int:
    """The least id that this rank owns, of the first million. Reads the device. Raises ValueError where it owns none of them."""
    if group.size == 1:
        return 0
    owners, end = owners_of(embedding_fn, group.size), min(_SEARCHED, vocab_size or _SEARCHED)
    for first in range(0, end, _INIT_BLOCK):
        ids = torch.arange(first, min(first + _INIT_BLOCK, end), device=group.device)
        mine = (owners.owner_of(ids) == group.rank).nonzero()
        if mine.numel():
            return first + int(mine[0])
    raise ValueError(
        f"rank {group.rank} owns none of the first {end} ids, but row_bound needs one to fill spare rows with; leave row_bound out, or "
        "take fewer ranks"
    )


def lookup(ids: Tensor, route: Route, embedding_fn: EmbeddingFn, name: str) -> Tensor:
    """Embeddings of ids (n,) at their reader: ids go to their owners, each is looked up once, rows come back (n, D).

    Collective over the route's group, forward and backward. Traffic is counted as "<name>.ids" and "<name>.rows".
    """
    owned = UniqueSpace.from_packed(route.to_owners(ids, f"{name}.ids"))
    rows = embed_owned(owned.tokens, embedding_fn)
    return route.to_readers(owned.expand(rows), f"{name}.rows")


def embed_owned(ids: Tensor, embedding_fn: EmbeddingFn) -> Tensor:
    """Call embedding_fn with distinct owned ids (n,) and check what it returns."""
    rows = embedding_fn(ids)
    if rows.dim() != 2 or rows.shape[0] != ids.numel() or not rows.is_floating_point():
        raise ValueError(
            f"embedding_fn returned {rows.dtype} of shape {tuple(rows.shape)} for {ids.numel()} ids; "
            f"return floating rows of shape ({ids.numel()}, D)"
        )
    return rows


class ShardedTokenEmbedding(nn.Module):
    """A (V, D) table whose rows, in permuted order, are sharded over the SSP group like a DTensor Shard(0).

    Backward records (row, gradient) pairs; `step()` reduces them over replicas, divides by the data-parallel size and updates
    the touched rows. The table is deliberately no nn.Parameter: a data-parallel engine would average different rows with each
    other. `state_dict()` holds DTensors (plain tensors without a group), optimizer state included, so torch.distributed.checkpoint
    saves it on N ranks and loads it on M.

    vocab_size, embedding_dim: V and D
    group:     SSPGroup, process group, or None for one rank
    optimizer: an update rule of ta_plugin.row_optimizers
    init_std:  rows start normal with this deviation, by default D ** -0.5; the same rows for every number of ranks
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        group: Any = None,
        *,
        optimizer: RowOptimizer | None = None,
        init_std: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim is {embedding_dim}; pass 1 or more")
        if optimizer is not None and not hasattr(optimizer, "init_state"):
            raise ValueError(
                f"optimizer is {optimizer!r}; pass a rule of ta_plugin.row_optimizers, such as LazyAdam(lr=1e-3)"
            )
        self.vocab_size = vocab_size
        self.embedding_dim = embedding_dim
        self.group = SSPGroup.wrap(group)
        self.owners = PermutedRows(vocab_size, self.group.size)
        self.optimizer = optimizer if optimizer is not None else RowWiseAdagrad()
        self.trainable = True
        first, last = self.owners.shard(self.group.rank)
        std = embedding_dim**-0.5 if init_std is None else init_std
        rows = initial_rows(first, last, embedding_dim, std, seed)
        self.rows = rows.to(device=device if device is not None else self.group.device, dtype=dtype)
        self.state = self.optimizer.init_state(self.rows)
        self.steps = torch.zeros((), dtype=torch.int64)
        self._recorded: list[tuple[Tensor, Tensor]] = []
        self._reduced: tuple[Tensor, Tensor] | None = None

    def regroup(self, group: Any) -> None:
        """Shard a whole table (built without a group, the same on every rank) over `group`: keep this rank's rows and their state,

        on the device that the group exchanges on: ids arrive there, and nobody else moves a table that is no parameter.
        """
        if self.group.size > 1:
            raise ValueError(
                f"the table is sharded over {self.group.size} ranks already; build it without a group to move it"
            )
        self.group = SSPGroup.wrap(group)
        self.owners = PermutedRows(self.vocab_size, self.group.size)
        mine = slice(*self.owners.shard(self.group.rank))
        self.rows = self.rows[mine].to(self.group.device, copy=True)
        self.state = {name: value[mine].to(self.group.device, copy=True) for name, value in self.state.items()}
        self.zero_grad()

    def owner_of(self, ids: Tensor) -> Tensor:
        """ids (n,) int64 -> owning rank in the group (n,) int64; -1 outside the vocabulary, which `Route.build` refuses on every rank."""
        return self.owners.owner_of(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows (n, D) of owned global ids (n,) int64. Gradients are recorded for `step()`.

        An id that this rank does not hold raises ValueError; on a GPU, where no value is read, it ends the process as nn.Embedding's
        do: "index out of bounds".
        """
        check_int64("ids", ids, 1)
        if ids.device.type != self.rows.device.type:
            raise ValueError(f"ids is on {ids.device}, the table on {self.rows.device}; move one to the other")
        rows = self.owners.local_row(ids, self.group.rank, other=self.rows.shape[0])  # a row that there is not
        # makes autograd call backward, also with no ids
        anchor = torch.empty(0, device=self.rows.device, requires_grad=self.trainable)
        try:
            return _OwnedRows.apply(anchor, rows, self)
        except IndexError as error:
            raise self._not_held(ids, rows) from error

    def _not_held(self, ids: Tensor, rows: Tensor) -> ValueError:
        i = int((rows == self.rows.shape[0]).nonzero()[0])
        if 0 <= int(ids[i]) < self.vocab_size:
            return ValueError(
                f"ids[{i}] is {int(ids[i])}, which rank {int(self.owner_of(ids[i]))} of {self.group.size} owns and not rank "
                f"{self.group.rank}; ask for it with TokenizedAttention.embed, which goes to the owners"
            )
        return ValueError(
            f"ids[{i}] is {int(ids[i])}, but vocab_size is {self.vocab_size}; pass ids of 0 or more, below it"
        )

    def in_place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's rows (R, D), and the row among them of each of the owned global ids (n,) int64: (n,) int64.

        Where `Bounds` finds an id wrong, any row will do.
        """
        return self.rows, self.owners.local_row(ids, self.group.rank, other=0)

    def record(self, rows: Tensor, grad: Tensor) -> None:
        """Add the gradient (n, D) of local rows (n,) to what the next `step()` applies. Backward calls this."""
        if self._reduced is not None:
            raise RuntimeError("backward ran between reduce_gradients() and step(); finish the step first")
        self._recorded.append((rows, grad))

    @property
    def holds_gradients(self) -> bool:
        """Whether a gradient waits for `step()`."""
        return bool(self._recorded) or self._reduced is not None

    def take_recorded(self) -> list[tuple[Tensor, Tensor]]:
        """What backward recorded since the last step, (rows, gradient) pairs; forgotten here."""
        recorded, self._recorded = self._recorded, []
        return recorded

    def reduce_gradients(self) -> None:
        """Fold the recorded gradients per row, sum them over the replicas and divide by DP. Collective over the replicas."""
        if self._reduced is not None:
            return
        empty = (torch.empty(0, dtype=torch.int64, device=self.rows.device), self.rows.new_empty(0, self.embedding_dim))
        rows = torch.cat([empty[0], *(r for r, _ in self._recorded)])
        grads = torch.cat([empty[1], *(g.to(self.rows.dtype) for _, g in self._recorded)])
        rows, grads = _fold_rows(rows, grads)
        if self.group.replicas is not None:
            replicas = SSPGroup(self.group.replicas, device=self.rows.device)
            counts = [n for (n,) in exchange_header(replicas, [rows.numel()])]
            rows = all_gather_rows(rows, counts, replicas, "replicas.ids")
            grads = all_gather_rows(grads, counts, replicas, "replicas.rows")
            rows, grads = _fold_rows(rows, grads)  # the same order on every replica: they stay bitwise equal
        self._recorded = []
        self._reduced = (rows, grads / self.group.data_parallel_size)

    def grad_norm_squared(self) -> Tensor:
        """Squared norm of the whole table's reduced gradient, a scalar equal on every rank. Collective."""
        self.reduce_gradients()
        assert self._reduced is not None
        mine = _squared_norm(self._reduced[1]).reshape(1)
        return all_gather_rows(mine, [1] * self.group.size, self.group, "norm").sum()

    def step(self, grad_scale: float | Tensor = 1.0) -> None:
        """Update the touched rows with `grad_scale` times the reduced gradient (clipping, loss scale), and forget it."""
        self.reduce_gradients()
        assert self._reduced is not None
        rows, grad = self._reduced
        self.steps += 1
        with torch.no_grad():
            self.optimizer.update(self.rows, self.state, rows, grad * grad_scale, int(self.steps))
        self._reduced = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget recorded gradients: what a skipped step does (overflow under loss scaling)."""
        super().zero_grad(set_to_none)
        self._recorded, self._reduced = [], None

    def load_dense(self, weight: Tensor) -> None:
        """Take this rank's rows from a whole table (V, D) in order of ids."""
        if tuple(weight.shape) != (self.vocab_size, self.embedding_dim):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; pass {(self.vocab_size, self.embedding_dim)}")
        ids = self.owners.ids_of_rows(torch.arange(*self.owners.shard(self.group.rank), device=weight.device))
        self.rows.copy_(weight.detach()[ids])

    def to_dense(self) -> Tensor:
        """The whole table (V, D) in order of ids, on every rank. Collective; for tests and small tables."""
        shards = [self.owners.shard(rank) for rank in range(self.group.size)]
        table = all_gather_rows(self.rows.detach(), [last - first for first, last in shards], self.group, "dense")
        return table[self.owners.permute(torch.arange(self.vocab_size, device=table.device))]

    def extra_repr(self) -> str:
        first, last = self.owners.shard(self.group.rank)
        return f"{self.vocab_size}, {self.embedding_dim}, rows [{first}, {last}), {self.group}"

    def _apply(self, fn: Any, recurse: bool = True) -> ShardedTokenEmbedding:
        super()._apply(fn, recurse)  # .to(), .cuda(), .double() reach the rows though they are no Parameter
        self.rows = fn(self.rows)
        self.state = {name: fn(value) for name, value in self.state.items()}
        return self

    def _sharded(self) -> dict[str, Tensor]:
        return {"weight": self.rows, **{f"optimizer.{name}": value for name, value in self.state.items()}}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, local in self._sharded().items():
            destination[prefix + name] = self._as_dtensor(local)
        destination[prefix + "optimizer.steps"] = self.steps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, missing, _, errors = args
        for name, local in [*self._sharded().items(), ("optimizer.steps", self.steps)]:
            value = state_dict.get(prefix + name)
            if value is None:
                missing.append(prefix + name)
                continue
            value = value.to_local() if hasattr(value, "to_local") else value
            if value.shape != local.shape:
                errors.append(
                    f"{prefix}{name} has shape {tuple(value.shape)}, but rank {self.group.rank} of {self.group.size} holds "
                    f"{tuple(local.shape)}; what was saved on another number of ranks is loaded by torch.distributed.checkpoint"
                )
            else:
                local.copy_(value)

    def _as_dtensor(self, local: Tensor) -> Tensor:
        if self.group.group is None:
            return local
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self.group.group, local.device.type)
        shape = torch.Size((self.vocab_size, *local.shape[1:]))
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())


class _OwnedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, table: ShardedTokenEmbedding) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows)
        return table.rows.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        ctx.table.record(rows, grad)
        return grad.new_empty(0), None, None


def _fold_rows(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    distinct = UniqueSpace.from_packed(rows)
    return (rows, grads) if distinct.all_distinct else (distinct.tokens, segment_sum(grads, distinct.segments))


def initial_rows(first: int, last: int, dim: int, std: float, seed: int) -> Tensor:
    """Rows [first, last) of the table that `seed` defines, whoever asks for them."""
    blocks = []
    for block in range(first // _INIT_BLOCK, -(-last // _INIT_BLOCK)):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + block) % 2**63)
        start = block * _INIT_BLOCK
        rows = torch.randn(_INIT_BLOCK, dim, dtype=torch.float32, generator=generator).mul_(std)
        blocks.append(rows[max(first - start, 0) : last - start])
    return torch.cat(blocks) if blocks else torch.empty(0, dim)


def _squared_norm(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()


def clip_grad_norm_(
    parameters: Iterable[Tensor], tables: Iterable[ShardedTokenEmbedding], max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip dense gradients in place to one global norm with sharded tables; returns (norm, scale for the tables' `step`).

    The dense gradients must already be reduced over DP, equal on every rank. As torch.nn.utils.clip_grad_norm_, with the tables'
    rows counted in. Collective over the tables' groups.
    """
    dense = [p.grad for p in parameters if p.grad is not None]
    squares = [_squared_norm(g) for g in dense] + [t.grad_norm_squared() for t in tables]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in dense:
        grad.mul_(scale)
    return norm, scale
