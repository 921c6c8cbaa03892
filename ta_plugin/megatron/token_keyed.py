"""Token-keyed layers for Megatron: causal at any depth, global, and exact in unique space (DESIGN section 5).

A layer's keys and values are projections of a table of its own, one row per token; its queries come from the hidden state of each position.
That is an architecture choice: no checkpoint with rotary attention loads into it. A mixed stack keeps stock layers, rotary
and best with a sliding window, between them. Every stage of a pipeline makes the plan from the tokens:

    plan = plan_causal(tokens, config)                                # tokens (B, L), once per microbatch
    model = GPTModel(config, get_token_keyed_block_spec(config, vocab_size, every=4), ...)
    model(tokens, position_ids, attention_mask, labels=labels, packed_seq_params=plan)

Under context parallelism every rank passes the tokens that Megatron deals it, zigzag, and token-keyed layers run over the group:
their keys and values are sent once per distinct token, where stock layers send every position's.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from ta_plugin.attention import CausalChunks, DecayKind, HeadDecay, causal_attention, choose_chunk
from ta_plugin.megatron.core_attention import SDPACoreAttention
from ta_plugin.megatron.layer_specs import final_norm, has_transformer_engine, stock_spec
from ta_plugin.megatron.refusals import check_dropout
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, causal_over_ranks
from ta_plugin.unique_space import UniqueSpace


@dataclass
class TokenKeyedSeqParams(PackedSeqParams):
    """PackedSeqParams that carry the chunks of a microbatch to its token-keyed layers. Made by `plan_causal`.

    chunks: of this rank's positions; over_ranks: where they are pieces of samples that lie on context-parallel ranks
    """

    chunks: CausalChunks | None = field(default=None)
    over_ranks: CausalRows | None = field(default=None)


def plan_causal(
    tokens: Tensor,
    config: TransformerConfig,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> TokenKeyedSeqParams:
    """What token-keyed layers need to know of a microbatch; the same on all ranks of TP and PP. Collective over context parallelism.

    tokens:     (B, L) int64 for hidden states (L, B, hidden); with context parallelism of N the (B, L / N) of this rank, pieces r and
                2 N - 1 - r of 2 N equal ones, as `get_batch_on_this_cp_rank` deals them
    lengths:    (B,) int64 valid positions of each whole row; all by default. Others come out of the layer as its bias alone
    cu_seqlens: (n + 1,) bounds of documents packed into the whole row, B = 1; a position sees its own document
    chunk:      positions per chunk, by default what `choose_chunk` says

    Raises ValueError, under context parallelism on every rank of the group.
    """
    parts = config.context_parallel_size
    group = SSPGroup(parallel_state.get_context_parallel_group() if parts > 1 else None)
    space, error = None, None
    try:
        space = _space_of(tokens, lengths, cu_seqlens, parts, group.rank)
        if chunk is None:
            head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            chunk = choose_chunk(space, heads, head_dim, tokens.device, decayed=True).size
        elif chunk < 1:
            raise ValueError(f"chunk is {chunk}; pass 1 or more")
    except ValueError as failure:
        error = failure
    if parts > 1:
        exchange_header(group, [], error)
    elif error is not None:
        raise error
    assert space is not None and chunk is not None
    length = parts * tokens.shape[1]  # GPTModel asks for it when it makes rotary embeddings
    params = TokenKeyedSeqParams(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
    if parts == 1:
        params.chunks = CausalChunks.of(space, chunk)
        return params
    params.over_ranks = CausalRows.of(space, HashOwners(parts), group).with_chunks(chunk)
    params.chunks = params.over_ranks.chunks
    return params


def _space_of(tokens: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, parts: int, rank: int) -> UniqueSpace:
    """Of the tokens this rank reads: of B samples, or with parts > 1 of two pieces of each, sample p * B + b being piece p of b."""
    if tokens.dim() != 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; pass (B, L)")
    batch, local = tokens.shape
    if cu_seqlens is not None and (batch != 1 or lengths is not None):
        raise ValueError(f"cu_seqlens is given with B = {batch} or lengths; pack documents into one row (1, L)")
    if parts == 1 and cu_seqlens is not None:
        return UniqueSpace.from_packed(tokens[0], cu_seqlens)
    pieces = 1 if parts == 1 else 2
    if local % pieces:
        raise ValueError(
            f"tokens have {local} positions on this context-parallel rank; pad the whole row to a multiple of {2 * parts}, twice the "
            "context parallel size"
        )
    size = local // pieces
    places = torch.tensor([0] if parts == 1 else [rank, 2 * parts - 1 - rank], device=tokens.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long().to(tokens.device)
        if bounds.dim() != 1 or bounds.numel() == 0 or (int(bounds[0]), int(bounds[-1])) != (0, parts * local):
            raise ValueError(
                f"cu_seqlens is {bounds.tolist()}; it must rise from 0 to the length of the whole row, {parts * local}"
            )
        mine = (bounds - size * places[:, None]).clamp(0, size).diff()  # (2, documents)
        return UniqueSpace.from_packed(tokens[0], torch.cat([mine.new_zeros(1), mine.reshape(-1).cumsum(0)]))
    if lengths is None:
        lengths = torch.full((batch,), parts * local, dtype=torch.int64, device=tokens.device)
    elif lengths.shape != (batch,) or (batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= parts * local):
        raise ValueError(f"lengths are {lengths.tolist()}; pass ({batch},) of whole rows, in [0, {parts * local}]")
    mine = (lengths - size * places[:, None]).clamp(0, size)
    grid = tokens.view(batch, pieces, size).transpose(0, 1).reshape(pieces * batch, size)
    return UniqueSpace.from_padded(grid, mine.reshape(-1))


class TokenKeyedSelfAttention(MegatronModule):
    """The self_attention slot of a token-keyed layer; heads are split over TP as in Megatron's own.

    vocab_size: ids lie below it; TP divides it
    token_dim:  width of the layer's table; hidden_size by default
    decay:      as for `ta_plugin.attention.HeadDecay`
    deterministic, backend: of `causal_attention`

    Rotary embeddings and masks that Megatron hands to every layer are not read: the plan says who sees whom. Raises ValueError for
    what is not exact.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        layer_number: int = 1,
        *,
        vocab_size: int,
        token_dim: int | None = None,
        decay: DecayKind = "learned",
        deterministic: bool = True,
        backend: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp"])
        self.tp_group, self.layer_number = groups.tp, layer_number
        self.deterministic, self.backend = deterministic, backend
        parts, rank = self.tp_group.size(), self.tp_group.rank()
        _check(config, vocab_size, parts)
        heads, kv_heads = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        self.head_dim = config.kv_channels or config.hidden_size // heads
        self.local_heads, self.local_kv_heads = heads // parts, kv_heads // parts
        token_dim = token_dim or config.hidden_size
        whole = copy(config)
        whole.sequence_parallel = False  # rows of tokens are the same on every rank of TP
        self.table = VocabParallelEmbedding(
            vocab_size, token_dim, init_method=config.init_method, config=whole, tp_group=self.tp_group
        )
        self.norm = nn.RMSNorm(token_dim, eps=config.layernorm_epsilon).to(config.params_dtype)
        linear: dict[str, Any] = {"init_method": config.init_method, "skip_bias_add": False, "tp_group": self.tp_group}
        biased = bool(config.add_bias_linear or config.add_qkv_bias)
        self.linear_q = ColumnParallelLinear(
            config.hidden_size, heads * self.head_dim, config=config, bias=biased, gather_output=False, **linear
        )
        self.linear_k, self.linear_v = (
            ColumnParallelLinear(
                token_dim, kv_heads * self.head_dim, config=whole, bias=biased, gather_output=False, **linear
            )
            for _ in range(2)
        )
        linear |= {"init_method": config.output_layer_init_method, "skip_bias_add": True}
        self.linear_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            config=config,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            **linear,
        )
        self.decay = HeadDecay(decay, heads, part=rank, parts=parts).to(config.params_dtype)
        for rate in self.decay.parameters():
            rate.tensor_model_parallel, rate.partition_dim, rate.partition_stride = True, 0, 1  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *_args: Any,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (L, B, hidden), over TP under sequence parallelism -> the same shape, and the bias still to be added."""
        chunks = chunks_of(packed_seq_params)
        if inference_context is not None:
            raise ValueError(
                "inference_context is given to a token-keyed layer; decode with ta_plugin.models.decode_cache.DecodeCache, which keeps "
                "distinct tokens"
            )
        space, over_ranks = chunks.space, getattr(packed_seq_params, "over_ranks", None)
        parts = 1 if over_ranks is None else over_ranks.owned.group.size
        if parts != self.config.context_parallel_size:
            raise ValueError(
                f"the plan is of context parallel size {parts}, the layer of {self.config.context_parallel_size}; pass plan_causal the "
                "layer's config"
            )
        q, _ = self.linear_q(hidden_states)
        length, batch = q.shape[:2]
        pieces = 1 if over_ranks is None else over_ranks.owned.pieces
        if (pieces * batch, length) != (space.num_samples, pieces * (space.padded_length or 0)) and (
            space.padded_length is not None or batch * length != space.num_occurrences
        ):
            raise ValueError(
                f"hidden_states have {length} positions of {batch} samples, but the plan {space.num_occurrences} of {space.num_samples}; "
                "make it from the tokens of this microbatch"
            )
        grid = q.view(pieces, length // pieces, batch, -1).transpose(1, 2).flatten(0, 1)  # (P * B, L / P, ...)
        packed = space.pack(grid) if space.padded_length is not None else grid.flatten(0, 1)
        owned = space if over_ranks is None else over_ranks.owned.space
        rows = self.norm(self.table(owned.tokens))
        k, v = (
            linear(rows)[0].view(-1, self.local_kv_heads, self.head_dim) for linear in (self.linear_k, self.linear_v)
        )
        packed = packed.reshape(-1, self.local_heads, self.head_dim)
        options: dict[str, Any] = {
            "decay": self.decay(),
            "scale": self.config.softmax_scale if hasattr(self.config, "softmax_scale") else None,
            "deterministic": self.deterministic,
            "backend": self.backend,
        }
        if over_ranks is None:
            out = causal_attention(space, packed, k, v, chunk=chunks, **options)
        else:
            out, _lse = causal_over_ranks(over_ranks, packed, k, v, **options)
        attended = space.unpack(out.flatten(1)).reshape(pieces, batch, length // pieces, -1)
        return self.linear_proj(attended.transpose(1, 2).reshape(length, batch, -1).contiguous())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For megatron.core.dist_checkpointing: loads under any TP size that divides the heads and the vocabulary."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        rates = dict(self.decay.named_parameters())
        return state | make_sharded_tensors_for_checkpoint(
            rates, f"{prefix}decay.", dict.fromkeys(rates, 0), sharded_offsets
        )


class UnplannedTransformerLayer(TransformerLayer):
    """A stock layer of a mixed stack: it sees positions, and no plan."""

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """As TransformerLayer. Raises ValueError for packed documents, which a causal mask alone does not part."""
        if packed_seq_params is not None and chunks_of(packed_seq_params).space.padded_length is None:
            raise ValueError(
                "the plan has cu_seqlens, but a stock layer of a mixed stack has no document mask; pass tokens (B, L) and lengths, or "
                "make every layer token-keyed (every=1)"
            )
        return super().forward(*args, packed_seq_params=None, **kwargs)


def get_token_keyed_layer_spec(
    config: TransformerConfig, vocab_size: int, *, use_transformer_engine: bool | None = None, **options: Any
) -> ModuleSpec:
    """A TransformerLayer whose attention is `TokenKeyedSelfAttention`; norms, MLP or MoE as ever.

    options: token_dim, decay, deterministic, backend
    """
    engine = has_transformer_engine() if use_transformer_engine is None else use_transformer_engine
    stock = stock_spec(config, engine)
    norm = stock.submodules.input_layernorm
    if norm is IdentityOp:  # Transformer Engine keeps it in the linear layer that this one replaces
        norm = final_norm(engine)
    attention = ModuleSpec(module=TokenKeyedSelfAttention, params={"vocab_size": vocab_size, **options})
    return ModuleSpec(
        module=TransformerLayer,
        params=dict(stock.params or {}),
        submodules=replace(stock.submodules, input_layernorm=norm, self_attention=attention),
    )


def get_token_keyed_block_spec(
    config: TransformerConfig,
    vocab_size: int,
    *,
    every: int = 4,
    use_transformer_engine: bool | None = None,
    use_sdpa: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **options: Any,
) -> TransformerBlockSubmodules:
    """A causal stack in which every `every`-th layer is token-keyed and global, this pipeline stage's part of it.

    The others are stock causal layers, rotary if the model is; give them a sliding window by config.window_size = (W - 1, 0). Padding
    must follow the valid positions. options: as for `get_token_keyed_layer_spec`. Raises ValueError unless every >= 1.

    use_sdpa: torch's scaled_dot_product_attention in local stock layers, as in `get_mixed_block_spec`; it wants an attention_mask, which
              then holds the window too, and under context parallelism is (B, 1, L / N, L) of this rank's positions onto all
    """
    if not 1 <= every <= config.num_layers:
        raise ValueError(
            f"every is {every}; pass 1 (all layers) to {config.num_layers} (the last), the number of layers, or no layer is token-keyed"
        )
    engine = has_transformer_engine() if use_transformer_engine is None else use_transformer_engine
    keyed = get_token_keyed_layer_spec(config, vocab_size, use_transformer_engine=engine, **options)
    stock = stock_spec(config, engine)
    plain = ModuleSpec(
        module=UnplannedTransformerLayer,
        params=dict(stock.params or {}),
        submodules=replace(
            stock.submodules, self_attention=_causal(stock.submodules.self_attention, use_sdpa and not engine)
        ),
    )
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    numbers = range(first + 1, first + 1 + get_num_layers_to_build(config, vp_stage, pp_rank))
    layers = [keyed if n % every == 0 else plain for n in numbers]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm(engine))


def chunks_of(packed_seq_params: PackedSeqParams | None) -> CausalChunks:
    """The chunks a layer was given. Raises ValueError when there are none."""
    chunks = getattr(packed_seq_params, "chunks", None)
    if chunks is None:
        raise ValueError(
            f"a token-keyed layer was called without its plan (packed_seq_params is {type(packed_seq_params).__name__}); pass "
            "packed_seq_params=plan_causal(tokens, config) to the model on every pipeline stage"
        )
    return chunks


def _causal(attention: Any, use_sdpa: bool) -> Any:
    changed = copy(attention)
    if use_sdpa:
        changed.submodules = replace(attention.submodules, core_attention=SDPACoreAttention)
    changed.params = {**(attention.params or {}), "attn_mask_type": AttnMaskType.causal}
    return changed


def _check(config: TransformerConfig, vocab_size: int, parts: int) -> None:
    if vocab_size % parts:
        raise ValueError(f"vocab_size is {vocab_size}, which tensor parallel size {parts} does not divide; pad it")
    groups = config.num_query_groups or config.num_attention_heads
    if groups % parts or config.num_attention_heads % parts:
        raise ValueError(f"num_query_groups is {groups}; tensor parallel size {parts} must divide it")
    check_dropout(config, "attention_dropout")
    if getattr(config, "multi_latent_attention", False):
        raise ValueError("multi_latent_attention is set; token-keyed layers have keys of their own. Set it to False")
