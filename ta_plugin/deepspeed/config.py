"""The "tokenized_attention" block of a DeepSpeed config: its keys, and errors that name them."""

from __future__ import annotations

import difflib
import json
import zlib
from typing import Annotated, Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, ValidationError

from ta_plugin.attention import Scoring
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.row_optimizers import SGD, Adagrad, LazyAdam, RowOptimizer, RowWiseAdagrad

BLOCK = "tokenized_attention"


class RowOptimizerConfig(DeepSpeedConfigModel):
    """The update rule of sharded rows, which the engine's optimizer does not see.

    type:  "rowwise_adagrad", "adagrad", "lazy_adam" or "sgd" (ta_plugin.row_optimizers)
    lr:    left out, the rows follow the learning rate of the engine's first parameter group, its schedule included
    betas: of lazy_adam; eps: of all but sgd
    """

    model_config = ConfigDict(strict=True)

    type: Literal["rowwise_adagrad", "adagrad", "lazy_adam", "sgd"] = "rowwise_adagrad"
    lr: float | None = Field(default=None, gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(default=1e-8, gt=0)

    def build(self) -> RowOptimizer:
        """The rule; without `lr` its rate is set before every step."""
        rate = 0.0 if self.lr is None else self.lr
        if self.type == "sgd":
            return SGD(rate)
        if self.type == "lazy_adam":
            return LazyAdam(rate, (self.betas[0], self.betas[1]), self.eps)
        return (Adagrad if self.type == "adagrad" else RowWiseAdagrad)(rate, self.eps)


class TokenizedAttentionConfig(DeepSpeedConfigModel):
    """The block. Writing it turns the plugin on; every key may be "auto", which is its default.

    enabled:          false leaves model and engine as they are
    size:             ranks of an SSP group; by default all data-parallel ranks, with layout "sequence" those of Ulysses' group
    layout:           "sample": each rank reads its own samples; "sequence": the ranks of Ulysses' group read chunks of the same
    strategy:         of every TokenizedAttention: "gather", "owner", "ring" or "positions"; by default what each was built with
    backend:          of `weighted_attention`, likewise
    deterministic:    whether backward repeats bit for bit, likewise; false is faster on a Hopper GPU, and without effect elsewhere
    shard_embeddings: shard an nn.Embedding that only TokenizedAttention modules use, and ShardedTokenEmbedding tables built whole
    embeddings:       patterns of names of further nn.Embedding modules to shard, looked up by ids of any shape ("encoder.tok*")
    optimizer:        of sharded rows; by default a table's own, and row-wise Adagrad for an nn.Embedding
    modules:          patterns of names of attention modules to run on distinct tokens: nn.MultiheadAttention, Hugging Face. Then all
                      ranks call the model equally often while gradients are on: a bad batch on one raises on all
    tokens:           with `modules`: the argument of the model's forward that holds the ids (B, L)
    lengths:          with `modules`: the argument that holds lengths (B,), or a mask (B, L) of valid slots, padded right
    verify:           with `modules`: check on their first forward that equal tokens have equal hidden states
    row_multiple:     distinct rows that layers run on (`modules`, Ulysses, `encode` of TokenizedAttention) are rounded up to a multiple
                      of this by rows that change nothing: shapes repeat for torch.compile, CUDA graphs and the allocator
    inexact:          what becomes of a layer that would not be exact: "leave" it as it is, or "error"
    """

    model_config = ConfigDict(strict=True)

    enabled: bool = True
    size: int | None = Field(default=None, ge=1)
    layout: Literal["sample", "sequence"] = "sample"
    strategy: Literal["gather", "owner", "ring", "positions"] | None = None
    backend: str | None = None
    deterministic: bool | None = None
    shard_embeddings: bool = True
    embeddings: list[str] = Field(default=[])
    optimizer: RowOptimizerConfig | None = None
    modules: list[str] = Field(default=[])
    tokens: str | None = None
    lengths: str | None = None
    verify: bool = True
    row_multiple: int = Field(default=1, ge=1)
    inexact: Literal["leave", "error"] = "leave"

    def scoring(self) -> Scoring:
        """Options of attention modules that bring none of their own."""
        return Scoring(backend=self.backend, deterministic=self.deterministic is not False)


def read_block(config: dict[str, Any]) -> TokenizedAttentionConfig | None:
    """The block of a DeepSpeed config, None without one. Raises ValueError with the key, its value and what to write."""
    for key in config:
        if key != BLOCK and difflib.get_close_matches(key.lower(), [BLOCK], cutoff=0.8):
            raise ValueError(f"the DeepSpeed config has the key {key!r}; did you mean {BLOCK!r}?")
    block = config.get(BLOCK)
    if block is None:
        return None
    if not isinstance(block, dict):
        raise ValueError(f'{BLOCK} is {block!r}; write an object of options, for example {{"size": 4}}')
    try:
        parsed = TokenizedAttentionConfig(**block)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(dict(problem)) for problem in error.errors())) from None
    if parsed.modules and parsed.tokens is None:
        raise ValueError(
            f"{BLOCK}.modules is {parsed.modules}, but {BLOCK}.tokens is not set; name the argument of the model's forward "
            'that holds the token ids, for example "input_ids"'
        )
    return parsed


def agree_on_block(config: dict[str, Any], world: SSPGroup) -> TokenizedAttentionConfig | None:
    """`read_block` on every rank: one rank's error, or a block that differs between ranks, raises on all. Collective."""
    block, error = None, None
    try:
        block = read_block(config)
    except ValueError as failure:
        error = failure
    content = -1 if block is None else zlib.crc32(json.dumps(block.model_dump(), sort_keys=True).encode())
    contents = [fields[0] for fields in exchange_header(world, [content], error)]
    for rank, other in enumerate(contents):
        if other != contents[0]:
            raise ValueError(f"{BLOCK} on rank {rank} differs from rank 0's; give every rank the same DeepSpeed config")
    return block if block is not None and block.enabled else None


def _explain(problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join([BLOCK, *path])
    if problem["type"] == "model_type":
        return f'{key} is {problem["input"]!r}; write an object of options, for example {{"type": "lazy_adam", "lr": 0.001}}'
    if problem["type"] != "extra_forbidden":
        return f"{key} is {problem['input']!r}: {problem['msg'].lower()}"
    model = RowOptimizerConfig if len(path) > 1 else TokenizedAttentionConfig
    close = difflib.get_close_matches(path[-1], model.model_fields, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(model.model_fields)}"
    return f"{key} is no known key; {remedy}"
