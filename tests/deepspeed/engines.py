"""Small engines on a rank pool: a target attention over a sharded table, and the same model dense on one process."""

from __future__ import annotations

import contextlib
import copy
import os
from dataclasses import dataclass, field
from typing import Any

from ranks import ON_GPUS, at_most

os.environ.setdefault("DS_ACCELERATOR", "cuda" if ON_GPUS else "cpu")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import attention_over_positions
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, TokenizedAttention
from ta_plugin.row_optimizers import SGD, Adagrad

WORLD = at_most(4)
SIZES = [size for size in (1, 2, 4) if size <= WORLD]  # of SSP groups
PART = SIZES[-2:][0]  # not all ranks, where there are several
VOCAB, DIM, BATCH, LENGTH, TARGETS = 23, 8, 3, 7, 2
ROW_RATE, DENSE_RATE, SGD_RATE = 0.1, 1e-2, 0.05


def start_deepspeed() -> None:
    """On every rank, before the first engine: no compiled shared-memory collectives (they cost 100 s), and a quiet log."""
    import logging

    import deepspeed

    import ta_plugin.deepspeed  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed("nccl" if ON_GPUS else "gloo", dist_init_required=False)


@dataclass(frozen=True)
class Setup:
    """One engine to build, and how to train it."""

    stage: int = 0
    size: int | None = min(2, WORLD)
    strategy: str = "owner"
    clip: float = 0.0
    accumulate: int = 1
    bf16: bool = False
    sgd: bool = False  # unlike Adagrad and AdamW, it notices a gradient that is off by a factor
    steps: int = 10
    block: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # further keys of the config

    def config(self) -> dict[str, Any]:
        zero = {"stage": self.stage, "stage3_param_persistence_threshold": 0}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**6,
            **self.more,
        }
        if self.bf16:
            config["bf16"] = {"enabled": True}
        if self.size is not None:
            config["tokenized_attention"] = {"size": self.size, "strategy": self.strategy, **self.block}
        return config


class Model(nn.Module):
    """Targets attend to a history; `table` is a ShardedTokenEmbedding, or an nn.Embedding for the plain model."""

    def __init__(self, table: nn.Module, batch: int = BATCH) -> None:
        super().__init__()
        # no key bias: its gradient is 0 but for rounding, which AdamW would scale up
        maps = {name: nn.Linear(DIM, DIM, bias=name != "key") for name in ("query", "key", "value", "output")}
        self.attention = TokenizedAttention(batch, LENGTH, 1, table, vocab_size=VOCAB, num_heads=2, **maps)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 1))

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.attention(tokens, lengths, targets=targets)).squeeze(-1)
        return F.mse_loss(scores.float(), labels)


def dense_loss(model: Model, tokens: Tensor, lengths: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """The loss of `Model` with an nn.Embedding, attending over every position."""
    attention, rows = model.attention, []
    for sample, length in enumerate(lengths.tolist()):
        history = attention.embedding_fn(tokens[sample, :length])
        queries = attention.projections.queries(attention.embedding_fn(targets[sample]))
        rows.append(attention_over_positions(queries, *attention.projections.keys_values(history)).flatten(1))
    scores = model.head(attention.output(torch.stack(rows))).squeeze(-1)
    return F.mse_loss(scores, labels)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    tokens = (torch.rand(BATCH, LENGTH, generator=g) ** 2 * VOCAB).long()
    lengths = torch.randint(0, LENGTH + 1, (BATCH,), generator=g)
    targets = torch.randint(0, VOCAB, (BATCH, TARGETS), generator=g)
    return tokens, lengths, targets, torch.randn(BATCH, TARGETS, generator=g)


def build_models(sgd: bool = False) -> tuple[Model, Model]:
    """The model with a whole ShardedTokenEmbedding, and the dense one with the same weights."""
    torch.manual_seed(7)
    rule = SGD(SGD_RATE) if sgd else Adagrad(ROW_RATE)
    table = ShardedTokenEmbedding(VOCAB, DIM, optimizer=rule, seed=3)
    model = Model(table)
    dense = copy.deepcopy(model)
    embedding = nn.Embedding(VOCAB, DIM)
    embedding.weight.data.copy_(table.to_dense())
    dense.attention.embedding_fn = embedding
    return model, dense


def dense_optimizers(dense: Model, sgd: bool = False) -> list[torch.optim.Optimizer]:
    if sgd:
        return [torch.optim.SGD(dense.parameters(), lr=SGD_RATE)]
    rows = dense.attention.embedding_fn.weight
    others = [p for p in dense.parameters() if p is not rows]
    return [torch.optim.Adagrad([rows], lr=ROW_RATE), torch.optim.AdamW(others, lr=DENSE_RATE)]


def gathered(model: nn.Module, stage: int) -> Any:
    """A context in which parameters are whole at every stage."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters())) if stage == 3 else contextlib.nullcontext()


def train_dense(dense: Model, setup: Setup, world: int, first: int = 0, optimizers: Any = None) -> list[float]:
    """Losses of the dense model on the batches of all ranks."""
    optimizers = optimizers or dense_optimizers(dense, setup.sgd)
    losses = []
    for step in range(first, first + setup.steps):
        dense.zero_grad()
        total = 0.0
        for micro in range(setup.accumulate):
            for rank in range(world):
                loss = dense_loss(dense, *batch(step * setup.accumulate + micro, rank)) / (world * setup.accumulate)
                loss.backward()
                total += loss.item()
        if setup.clip:
            nn.utils.clip_grad_norm_(dense.parameters(), setup.clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(total)
    return losses


def build_engine(model: nn.Module, setup: Setup, **kwargs: Any) -> Any:
    from ta_plugin.deepspeed import initialize

    parameters = model.parameters()
    optimizer = torch.optim.SGD(parameters, SGD_RATE) if setup.sgd else torch.optim.AdamW(parameters, DENSE_RATE)
    return initialize(model=model, optimizer=optimizer, config=setup.config(), **kwargs)[0]


def train_engine(engine: Any, setup: Setup, first: int = 0) -> list[float]:
    """Losses of an engine, averaged over ranks and micro-batches."""
    rank, world, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(first, first + setup.steps):
        total = torch.zeros(())
        for micro in range(setup.accumulate):
            loss = engine(*batch(step * setup.accumulate + micro, rank))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / setup.accumulate
        dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses
