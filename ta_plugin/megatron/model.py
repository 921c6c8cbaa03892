"""A language model whose layers run on the distinct rows of each microbatch and which expands only what its loss needs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from ta_plugin.checks import check_tensor, check_tokens
from ta_plugin.megatron.core_attention import TokenizedCoreAttention
from ta_plugin.megatron.embedding import SSPTokenEmbedding
from ta_plugin.megatron.groups import collection_of
from ta_plugin.megatron.layer_specs import get_block_spec, get_tokenized_layer_spec
from ta_plugin.megatron.layers import PositionTransformerLayer, TokenizedTransformerLayer, rotary_angles
from ta_plugin.megatron.loss import LabelledRows, check_labels
from ta_plugin.megatron.plan import RowLayout, TokenizedSeqParams, layout_of, plan_microbatch
from ta_plugin.megatron.refusals import check_model, check_rotary
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.routing import PermutedRows
from ta_plugin.strategies import Layout, OwnedRows
from ta_plugin.unique_space import UniqueSpace


class TokenizedModel(LanguageModule):
    """Embedding, TransformerBlock and output layer over distinct rows; every pipeline stage plans from the tokens.

    config:       a TransformerConfig with no dropout; variable_seq_lengths=True under pipeline parallelism
    layer_spec:   what TransformerBlock takes: get_tokenized_layer_spec (the default), or get_mixed_block_spec
    vocab_size:   ids of tokens and labels lie below it; tensor parallelism divides it
    pg_collection: with an SSP group attached (`SSPGroups.attach`), the table is sharded over it; otherwise it is whole
    layout:       "sample": every context-parallel rank is given whole samples. "sequence": each is given its chunks of them, of any
                  lengths; rows are then owned by hash of their token, and keys and values circulate between the owners
    row_multiple: rows are padded to this multiple per rank: fewer distinct shapes for the allocator
    row_capacity: rows are padded to this number per microbatch, or to the smallest of several that holds them: few shapes, for CUDA
                  graphs and the allocator. One number serves pipelines without variable_seq_lengths, whose schedule is then called
                  with seq_length=row_capacity and micro_batch_size=1
    deterministic: whether backward of tokenized layers repeats bit for bit; config.deterministic_mode has it do so in any case
    rotary_base: rotary positions with this base in the stock layers of a mixed stack; config.no_rope_freq keeps the others free
    pre_process, post_process, vp_stage: as for GPTModel

    Raises ValueError at construction for what would not be exact.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        layer_spec: ModuleSpec | TransformerBlockSubmodules | None = None,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        row_multiple: int = 1,
        row_capacity: int | Sequence[int] | None = None,
        vocab_divisible_by: int = 128,
        embedding_seed: int = 0,
        layout: Layout = "sample",
        rotary_base: float | None = None,
        deterministic: bool = True,
    ) -> None:
        groups = collection_of(pg_collection)
        super().__init__(config=config, pg_collection=groups)
        if row_multiple < 1:
            raise ValueError(f"row_multiple is {row_multiple}; pass 1 or more")
        if vocab_size % groups.tp.size():
            raise ValueError(
                f"vocab_size is {vocab_size}, which tensor parallel size {groups.tp.size()} does not divide; pad it to a multiple"
            )
        self.vocab_size, self.row_multiple, self.row_capacity = vocab_size, row_multiple, row_capacity
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        if layout not in ("sample", "sequence"):
            raise ValueError(f"layout is {layout!r}; pass 'sample' or 'sequence'")
        self.layout: Layout = layout
        self.context = SSPGroup(self.cp_group if self.cp_group.size() > 1 else None)
        rows = -(-vocab_size // vocab_divisible_by) * vocab_divisible_by
        self.owners = PermutedRows(
            rows, self.context.size
        )  # the table's own ownership where SSP and CP are the same ranks
        self.rotary_base = rotary_base
        self.share_embeddings_and_output_weights = False  # rows of the table lie with their owners
        self.model_type = ModelType.encoder_or_decoder
        spec = get_tokenized_layer_spec(config) if layer_spec is None else layer_spec
        if isinstance(spec, ModuleSpec):
            spec = get_block_spec(config, spec, vp_stage=vp_stage, pp_rank=groups.pp.rank())
        first_layer = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
        check_model(config, row_capacity, mixed=layer_spec is spec)  # only mixed stacks are given as whole blocks
        if rotary_base is not None:
            check_rotary(config, [layer.module is TokenizedTransformerLayer for layer in spec.layer_specs], first_layer)
        if pre_process:
            self.embedding = SSPTokenEmbedding(
                config, vocab_size, groups, divisible_by=vocab_divisible_by, seed=embedding_seed
            )
            self.embedding.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        for module in self.decoder.modules():
            if isinstance(module, TokenizedCoreAttention):
                module.set_deterministic(deterministic)
        self.ends_in_positions = bool(spec.layer_specs) and issubclass(
            spec.layer_specs[-1].module, PositionTransformerLayer
        )
        if post_process:
            self.output_layer = self._output_layer(config)
            self.output_layer.weight.is_embedding_or_output_parameter = True  # type: ignore[union-attr]

    def plan(self, tokens: Tensor, lengths: Tensor) -> TokenizedSeqParams:
        """What the layers of a microbatch need to know; `forward` makes it unless it is given.

        Collective over context parallelism in layout "sequence".
        """
        multiple = self.row_multiple
        if self.config.sequence_parallel:
            multiple *= self.tp_group.size()
        if self.layout == "sequence":
            owned = OwnedRows.of(UniqueSpace.from_padded(tokens, lengths), self.owners, self.context)
            return TokenizedSeqParams.of(RowLayout.of_owned(owned, multiple=multiple, capacity=self.row_capacity))
        return plan_microbatch(
            tokens,
            lengths,
            parts=self.cp_group.size(),
            part=self.cp_group.rank(),
            multiple=multiple,
            capacity=self.row_capacity,
        )

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        labels: Tensor | None = None,
        select: Tensor | None = None,
        *,
        plan: TokenizedSeqParams | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """One microbatch: tokens (B, L) int64 and lengths (B,) int64, the same on every rank of TP, CP and PP; in layout "sequence"
        those of this CP rank's chunks, the same on every rank of TP and PP.

        labels: (B, L) int64, what each occurrence shall predict, negative for nothing. On the last stage -> losses (P,) fp32 of
                the distinct (row, label) pairs, each times its number of occurrences; see `loss_function`
        select: (B, L) bool, instead of labels -> logits (n, vocab / TP) of the selected occurrences, in order of (b, l); what lies
                past a length is none
        Neither, or another stage -> hidden states of the rows, (local, 1, hidden)

        rotary_pos_emb: for the stock layers of a mixed stack, instead of what rotary_base gives

        Collective over SSP, TP, CP and EP. Ids that are negative or not below vocab_size raise ValueError on every rank of SSP. A
        pipeline's other stages would wait for those: `check_microbatches`, once per step, raises on all.
        """
        plan = self._agreed_plan(tokens, lengths, labels, plan)
        layout = layout_of(plan)
        if self.rotary_base is not None and rotary_pos_emb is None:
            rotary_pos_emb = rotary_angles(
                tokens.shape[1], self.config.kv_channels, self.rotary_base, device=tokens.device
            )
        hidden = self.decoder(
            hidden_states=self.embedding(layout) if self.pre_process else None,
            attention_mask=None,
            packed_seq_params=plan,
            **({} if rotary_pos_emb is None else {"rotary_pos_emb": rotary_pos_emb}),
        )
        if not self.post_process or (labels is None and select is None):
            return hidden
        if labels is not None:
            return self._losses(hidden, labels, layout)
        assert select is not None
        rows = self._rows(hidden)
        if layout.owned is not None:
            rows = layout.owned.to_readers(rows[: layout.rows], "selected")
        return self._logits(rows, self._selected(select, layout))

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the pipeline schedule received from the stage before."""
        received = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(received[0])

    def _agreed_plan(
        self, tokens: Tensor, lengths: Tensor, labels: Tensor | None, plan: TokenizedSeqParams | None
    ) -> TokenizedSeqParams:
        shared = self.layout == "sequence"
        error: Exception | None = None
        try:
            check_tensor("tokens", tokens)
            check_tokens("tokens", tokens, tokens.device, self.vocab_size, lengths)
            if labels is not None:
                check_labels(labels, tokens.shape[0], tokens.shape[1], self.vocab_size)
            plan = self.plan(tokens, lengths) if plan is None and not shared else plan
        except ValueError as failure:
            error = failure
        exchanging = [self.embedding.group] if self.pre_process else []
        for group in [*exchanging, *([self.context] if shared else [])]:
            try:  # what is wrong on one rank raises on all that exchange rows
                batches = exchange_header(group, [0 if error else tokens.shape[0]], error)
            except ValueError as failure:
                error = failure
        if error is not None:
            raise error
        if shared and batches != [batches[0]] * self.context.size:
            raise ValueError(
                f"tokens hold {[b for (b,) in batches]} samples on the context-parallel ranks; give each its chunks of the same samples, "
                "empty ones with length 0"
            )
        return self.plan(tokens, lengths) if plan is None else plan

    def _losses(self, hidden: Tensor, labels: Tensor, layout: RowLayout) -> Tensor:
        of = LabelledRows.of_positions if self.ends_in_positions else LabelledRows.of
        if layout.owned is not None:
            of = LabelledRows.of_chunks
        pairs = of(labels, layout, self.vocab_size)
        logits = self._logits(self._rows(hidden), pairs.rows)
        losses = self.compute_language_model_loss(pairs.labels[None], logits[:, None].contiguous())
        return losses[0] * pairs.counts

    def _rows(self, hidden: Tensor) -> Tensor:
        """All rows of this rank's part, (n, hidden), from what the last layer left."""
        if self.config.sequence_parallel:
            # the output layer's input gradient is already summed over TP: backward only takes this rank's share
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden.flatten(0, 1)

    def _logits(self, rows: Tensor, index: Tensor) -> Tensor:
        logits, _bias = self.output_layer(rows.index_select(0, index).unsqueeze(1))
        return logits[:, 0]

    def _selected(self, select: Tensor, layout: RowLayout) -> Tensor:
        space = layout.space if layout.owned is None else layout.owned.reader
        if self.cp_group.size() > 1 and layout.owned is None:
            raise ValueError(
                f"select is given under context parallel size {self.cp_group.size()}, where each rank holds a part of the rows; "
                "evaluate with context parallel size 1, or in layout 'sequence'"
            )
        if select.dtype != torch.bool or tuple(select.shape) != (space.num_samples, space.padded_length):
            raise ValueError(
                f"select is {select.dtype} of shape {tuple(select.shape)}; pass bool of shape {(space.num_samples, space.padded_length)}"
            )
        if not self.ends_in_positions:
            return space.inverse[space.pack(select)]
        inside = torch.arange(select.shape[1], device=select.device) < space.cu_occurrences.diff()[:, None]
        sample, place = (select & inside).nonzero(as_tuple=True)
        return place * space.num_samples + sample

    def _output_layer(self, config: TransformerConfig) -> nn.Module:
        unscattered = copy(config)
        unscattered.sequence_parallel = False  # its input is gathered before rows are picked
        return ColumnParallelLinear(
            config.hidden_size,
            self.vocab_size,
            config=unscattered,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
