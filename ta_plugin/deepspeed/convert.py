"""What the block does to a model: who gets group, strategy and backend, which embeddings are sharded, and what is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from deepspeed.pipe import PipelineModule
from torch import nn

from ta_plugin.attention.backends import choose
from ta_plugin.deepspeed.config import BLOCK, TokenizedAttentionConfig
from ta_plugin.deepspeed.huggingface import tokenize_huggingface, why_not_huggingface
from ta_plugin.deepspeed.multihead import TokenizedMultiheadAttention, why_not_multihead
from ta_plugin.deepspeed.plan import TokenPlan
from ta_plugin.deepspeed.sharding import RoutedTokenEmbedding, set_table, shard, table_of, why_not_shardable
from ta_plugin.deepspeed.ulysses import TokenizedUlyssesAttention
from ta_plugin.embedding import ShardedTokenEmbedding
from ta_plugin.parallel import SSPGroup
from ta_plugin.row_optimizers import RowOptimizer
from ta_plugin.tokenized_attention import TokenizedAttention


@dataclass
class Conversion:
    """What was done to a model.

    changed, left: (module name, what or why)
    tables:        sharded tables by name, each once
    following:     names of tables whose learning rate follows the engine's
    replaced:      ids of parameters that no longer train in the engine
    plan:          where `modules` find the tokens of the current batch, or None
    """

    group: SSPGroup
    changed: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, ShardedTokenEmbedding] = field(default_factory=dict)
    following: list[str] = field(default_factory=list)
    replaced: set[int] = field(default_factory=set)
    plan: TokenPlan | None = None

    def __str__(self) -> str:
        lines = [f"{BLOCK}: {self.group.size} rank(s) per SSP group, {self.group.num_replicas} replica(s)"]
        lines += [f"  changed {name or '(model)'}: {what}" for name, what in self.changed]
        lines += [f"  left {name or '(model)'}: {why}" for name, why in self.left]
        return "\n".join(lines if len(lines) > 1 else [*lines, "  found nothing to change"])


def convert(
    model: nn.Module,
    block: TokenizedAttentionConfig,
    group: SSPGroup,
    sequence_group: SSPGroup | None = None,
    world: SSPGroup | None = None,
) -> Conversion:
    """Apply the block to a model in place. Collective over the group, which must be the same call on every rank of it.

    sequence_group: Ulysses' group, with the "sequence" layout
    world:          the ranks that train together, `group` by default: what `modules` find wrong on one of them raises on all
    """
    _check_backend(block, group)
    _check_patterns(model, block)
    done = Conversion(group)
    _place_ulysses(model, block, sequence_group, done)
    _shard_tables(model, block, done)
    _shard_named_embeddings(model, block, done)
    for name, module in _attentions(model):
        module.strategy = block.strategy or module.strategy
        module.row_multiple = block.row_multiple if block.row_multiple > 1 else module.row_multiple
        module.regroup(group, block.layout)
        repeats = module.scoring.deterministic if block.deterministic is None else block.deterministic
        module.scoring = replace(module.scoring, backend=block.backend or module.scoring.backend, deterministic=repeats)
        backend = module.scoring.backend or "chosen per call"
        done.changed.append(
            (name, f"TokenizedAttention, layout {module.layout}, strategy {module.strategy}, backend {backend}")
        )
    for name, module in model.named_modules():
        own = TokenizedAttention | ShardedTokenEmbedding
        if not isinstance(module, own) and callable(getattr(module, "regroup", None)):
            module.regroup(group)
            done.changed.append((name, f"{type(module).__name__}.regroup()"))
    _tokenize_modules(model, block, done, group if world is None else world)
    if done.left and block.inexact == "error":
        reasons = "; ".join(f"{name}: {why}" for name, why in done.left)
        raise ValueError(f'{BLOCK}.inexact is "error", and these would be left as they are: {reasons}')
    return done


def _attentions(model: nn.Module) -> list[tuple[str, TokenizedAttention]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TokenizedAttention)]


def _place_ulysses(model: nn.Module, block: TokenizedAttentionConfig, group: SSPGroup | None, done: Conversion) -> None:
    for name, module in model.named_modules():
        if isinstance(module, TokenizedUlyssesAttention):
            if group is None:
                done.left.append((name, f'{BLOCK}.layout is "sample": it attends within what one rank reads'))
            else:
                module.set_group(group, block.scoring(), block.row_multiple)
                done.changed.append((name, f"local attention of Ulysses over {group.size} rank(s)"))
        elif isinstance(module, TokenizedAttention):
            _check_layout(name, module, block, group, done.group)


def _check_layout(
    name: str, module: TokenizedAttention, block: TokenizedAttentionConfig, sequence: SSPGroup | None, group: SSPGroup
) -> None:
    """What a rank reads must be what its attention takes it for."""
    if sequence is None and module.layout == "sequence":
        raise ValueError(
            f'{name} has layout "sequence", and {BLOCK}.layout is "sample": it would take a whole sample for a chunk; write '
            '"layout": "sequence"'
        )
    if sequence is not None and sequence.ranks != group.ranks:
        raise ValueError(
            f"{name} is a TokenizedAttention over chunks on ranks {sequence.ranks}, but {BLOCK}.size makes its SSP group "
            f"{group.ranks}; leave size out, or set it to {sequence.size}"
        )


def _check_backend(block: TokenizedAttentionConfig, group: SSPGroup) -> None:
    if block.backend is None:
        return
    try:
        choose(
            block.backend,
            device=group.device,
            dtype=torch.float32,
            head_dim=64,
            value_dim=64,
            per_query_weights=False,
            causal=False,
        )
    except ValueError as error:
        raise ValueError(f"{BLOCK}.backend: {error}") from None


def _check_patterns(model: nn.Module, block: TokenizedAttentionConfig) -> None:
    if isinstance(model, PipelineModule):  # a stage holds some modules only
        return
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding | ShardedTokenEmbedding)]
    for pattern in block.embeddings:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{BLOCK}.embeddings has {pattern!r}, which matches no embedding; the model has {', '.join(names) or 'none'}"
            )


def _shard_tables(model: nn.Module, block: TokenizedAttentionConfig, done: Conversion) -> None:
    """Tables and embeddings that TokenizedAttention modules look tokens up in, and tables that stand alone."""
    owners: dict[int, list[tuple[str, TokenizedAttention]]] = {}
    found: dict[int, tuple[str, object]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ShardedTokenEmbedding):
            found.setdefault(id(module), (name, module))
    for name, attention in _attentions(model):
        table = table_of(attention)
        owners.setdefault(id(table), []).append((name, attention))
        found.setdefault(id(table), (f"{name}.embedding_fn" if name else "embedding_fn", table))
    for key, (name, table) in found.items():
        if isinstance(table, ShardedTokenEmbedding):
            _adopt(name, table, block, done)
        elif isinstance(table, nn.Embedding):
            _replace_embedding(model, name, table, owners[key], block, done)


def _adopt(name: str, table: ShardedTokenEmbedding, block: TokenizedAttentionConfig, done: Conversion) -> None:
    group = done.group
    if table.group.size == 1:
        if group.size > 1 and not block.shard_embeddings:
            raise ValueError(
                f"{name} is a ShardedTokenEmbedding on one rank, and {BLOCK}.shard_embeddings is false; leave that key out"
            )
        table.regroup(group)
        here = f"{table.rows.shape[0]} of {table.vocab_size} rows here"
        done.changed.append(
            (name, f"table sharded, {here}" if group.size > 1 else f"table keeps its {table.rows.shape[0]} rows here")
        )
    elif table.group.size != group.size:
        raise ValueError(
            f"{name} is sharded over {table.group.size} ranks, but {BLOCK}.size makes groups of {group.size}; build the table "
            "without a group, or set the same size"
        )
    else:
        table.group = group  # the same ranks hold the same rows; replicas and divisor are the engine's
        done.changed.append((name, f"table keeps its {table.rows.shape[0]} rows here"))
    if block.optimizer is not None:
        table.optimizer = _rule(block, name, done) or table.optimizer
        table.state = table.optimizer.init_state(table.rows)
    done.tables[name] = table


def _replace_embedding(
    model: nn.Module,
    name: str,
    embedding: nn.Embedding,
    users: list[tuple[str, TokenizedAttention]],
    block: TokenizedAttentionConfig,
    done: Conversion,
) -> None:
    if not block.shard_embeddings:
        done.left.append((name, f"{BLOCK}.shard_embeddings is false: a replicated nn.Embedding, owned by hash"))
        return
    reason = why_not_shardable(embedding) or _tied(model, embedding) or _used_elsewhere(model, embedding)
    if reason is not None:
        done.left.append((name, f"not sharded: {reason}"))
        return
    table = shard(embedding, done.group, _rule(block, name, done))
    for _, attention in users:
        set_table(attention, table)
    done.tables[name] = table
    done.replaced.add(id(embedding.weight))
    done.changed.append((name, _sharded(table)))


def _used_elsewhere(model: nn.Module, embedding: nn.Embedding) -> str | None:
    for name, module in model.named_modules():
        for child, other in module.named_children():
            if other is embedding and not isinstance(module, TokenizedAttention):
                path = f"{name}.{child}" if name else child
                return f"the model holds it as {path} too and may call it; name it in {BLOCK}.embeddings to shard both"
    return None


def _shard_named_embeddings(model: nn.Module, block: TokenizedAttentionConfig, done: Conversion) -> None:
    sharded: dict[int, RoutedTokenEmbedding] = {}
    for parent_name, parent in list(model.named_modules()):
        for child, module in list(parent.named_children()):
            name = f"{parent_name}.{child}" if parent_name else child
            if isinstance(parent, TokenizedAttention) or not isinstance(module, nn.Embedding):
                continue
            if not any(fnmatchcase(name, pattern) for pattern in block.embeddings):
                continue
            reason = why_not_shardable(module) or _tied(model, module)
            if reason is not None:
                done.left.append((name, f"not sharded: {reason}"))
                continue
            if id(module) not in sharded:
                routed = RoutedTokenEmbedding(shard(module, done.group, _rule(block, name, done)))
                sharded[id(module)] = routed
                done.left[:] = [entry for entry in done.left if not _is_user_of(model, entry[0], module)]
                for _, attention in _attentions(model):
                    if table_of(attention) is module:
                        set_table(attention, routed.table)
                done.tables[name] = routed.table
                done.replaced.add(id(module.weight))
                done.changed.append((name, _sharded(routed.table)))
            setattr(parent, child, sharded[id(module)])
            if isinstance(parent, PipelineModule):  # which calls its layers from a list of its own
                parent.forward_funcs[:] = [sharded[id(module)] if f is module else f for f in parent.forward_funcs]


def _is_user_of(model: nn.Module, name: str, embedding: nn.Embedding) -> bool:
    """Whether `name` is where an attention reported that it left this embedding alone."""
    owner = name.removesuffix("embedding_fn").removesuffix(".")
    return any(found == owner and table_of(module) is embedding for found, module in _attentions(model))


def _tied(model: nn.Module, embedding: nn.Embedding) -> str | None:
    for name, module in model.named_modules():
        for child, parameter in module.named_parameters(recurse=False):
            if parameter is embedding.weight and module is not embedding:
                return f"its weight is tied to {name}.{child}"
    return None


def _sharded(table: ShardedTokenEmbedding) -> str:
    rule = type(table.optimizer).__name__
    return f"nn.Embedding sharded, {table.rows.shape[0]} of {table.vocab_size} rows here, trained by {rule}"


def _rule(block: TokenizedAttentionConfig, name: str, done: Conversion) -> RowOptimizer | None:
    if block.optimizer is None:
        return None
    if block.optimizer.lr is None:
        done.following.append(name)
    return block.optimizer.build()


def _tokenize_modules(model: nn.Module, block: TokenizedAttentionConfig, done: Conversion, together: SSPGroup) -> None:
    """nn.MultiheadAttention and Hugging Face attention modules that the block names."""
    if not block.modules:
        return
    assert block.tokens is not None
    if isinstance(model, PipelineModule):
        done.left.append(("", f"{BLOCK}.modules has no effect in a pipeline: token ids do not reach later stages"))
        return
    plan = TokenPlan(block.tokens, block.lengths, together, verify=block.verify, row_multiple=block.row_multiple)
    scoring = block.scoring()
    named = [
        (name, module)
        for name, module in model.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in block.modules)
    ]
    if not named:
        raise ValueError(f"{BLOCK}.modules is {block.modules}, which matches no module; see model.named_modules()")
    for name, module in named:
        kind = type(module).__name__
        if type(module) is nn.MultiheadAttention:
            reason = why_not_multihead(module)
            if reason is None:
                TokenizedMultiheadAttention.adopt(module, plan, scoring)
        else:
            reason = why_not_huggingface(model, module)
            if reason is None:
                tokenize_huggingface(model, module, plan, scoring)
        if reason is None:
            done.plan = plan
            done.changed.append((name, f"{kind} attends over distinct tokens of {block.tokens!r}"))
        else:
            done.left.append((name, reason))
    if done.plan is not None:
        plan.follow(model)
