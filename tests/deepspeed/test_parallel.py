"""Beside Ulysses, tensor parallelism, pipelines and MoE."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from engines import DIM, SGD_RATE, VOCAB, Setup
from torch import Tensor, nn

from ta_plugin import SSPGroup
from ta_plugin.attention import Scoring

HEADS, LONG = 4, 8
OPTIMIZER = {"type": "sgd", "lr": SGD_RATE}  # notices a gradient that is off by a factor, as Adagrad and AdamW do not


class Plain(nn.Module):
    """Attention over every position: q, k, v (B, L, H, D)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class UlyssesPlain(nn.Module):
    """DeepSpeed's own: `Plain` over sequences whose chunks lie on the ranks of `group`."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        from deepspeed.sequence.layer import DistributedAttention

        self.attend = DistributedAttention(Plain(), group, 2, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        return self.attend(q, k, v, 0)


class SequenceModel(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.head = nn.Linear(DIM, VOCAB)
        self.attention = attention

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, -1)) for x in self.qkv(self.embedding(tokens)).chunk(3, -1))
        return self.head(self.attention(q, k, v, tokens).flatten(2))


def sequences(step: int, replica: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + replica)
    tokens = (torch.rand(2, LONG, generator=g) ** 2 * VOCAB).long()
    return tokens, (3 * tokens + 1) % VOCAB


def beside_ulysses(stage: int, size: int, layout: str, clip: float) -> None:
    """Ulysses 2 on 4 ranks, the embedding sharded over SSP groups of `size`: losses of the dense model."""
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
    from deepspeed.utils import groups

    from ta_plugin.deepspeed import TokenizedUlyssesAttention, initialize, sequence_parallel_loss

    mpu.initialize_sequence_parallel(2)
    try:
        torch.manual_seed(1)
        ours = TokenizedUlyssesAttention() if layout == "sequence" else UlyssesPlain(mpu.get_sequence_parallel_group())
        model, dense = SequenceModel(ours), SequenceModel(Plain())
        dense.load_state_dict(model.state_dict())
        block = {"size": size, "layout": layout, "embeddings": ["embedding"], "optimizer": OPTIMIZER, "row_multiple": 5}
        config = Setup(stage=stage, size=None, clip=clip).config() | {"tokenized_attention": block}
        optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
        engine = initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
        assert type(model.embedding).__name__ == "RoutedTokenEmbedding"
        reference = torch.optim.SGD(dense.parameters(), lr=SGD_RATE)
        rank, half = dist.get_rank(), LONG // 2
        for step in range(6):
            dense.zero_grad()
            expected = (
                sum(
                    F.cross_entropy(dense(x).flatten(0, 1), y.flatten())
                    for x, y in (sequences(step, r) for r in (0, 1))
                )
                / 2
            )
            expected.backward()
            if clip:
                nn.utils.clip_grad_norm_(dense.parameters(), clip)
            reference.step()
            chunk = slice((rank % 2) * half, (rank % 2 + 1) * half)
            x, y = (t[:, chunk] for t in sequences(step, rank // 2))
            loss = F.cross_entropy(engine(x).flatten(0, 1), y.flatten())
            engine.backward(sequence_parallel_loss(engine, loss))
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 4, expected.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.embedding.table.to_dense(), dense.embedding.weight.detach(), rtol=0, atol=1e-5)
        engine.destroy()
    finally:
        mpu._release_sequence_parallel_groups()
        groups.mpu = None


@pytest.mark.parametrize("layout", ["sample", "sequence"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_beside_ulysses(engines_on: Any, stage: int, layout: str) -> None:
    engines_on(4).run(beside_ulysses, stage, 2, layout, 0.1 if layout == "sample" else 0.0)


def test_beside_ulysses_over_all_ranks(engines_on: Any) -> None:
    engines_on(4).run(beside_ulysses, 2, 4, "sample", 0.0)


class ColumnThenRow(nn.Module):
    """A tensor-parallel pair of linear layers: hidden units split over `group`, outputs summed over it."""

    def __init__(self, whole_in: nn.Linear, whole_out: nn.Linear, group: Any) -> None:
        super().__init__()
        rank, size, self.group = dist.get_rank(group), dist.get_world_size(group), group
        width = whole_in.out_features // size
        part = slice(rank * width, (rank + 1) * width)
        self.inner = nn.Linear(whole_in.in_features, width, bias=False)
        self.outer = nn.Linear(width, whole_out.out_features, bias=False)
        self.inner.weight.data.copy_(whole_in.weight.data[part])
        self.outer.weight.data.copy_(whole_out.weight.data[:, part])
        for layer in (self.inner, self.outer):
            layer.weight.model_parallel = True  # what DeepSpeed calls a parameter whose norm adds up over the group

    def forward(self, x: Tensor) -> Tensor:
        return _SumForward.apply(self.outer(torch.tanh(self.inner(_SumBackward.apply(x, self.group)))), self.group)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class TokenMLP(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.mlp = mlp
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mlp(self.embedding(tokens)))


def beside_tensor_parallelism(stage: int, size: int, clip: float) -> None:
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    from ta_plugin.deepspeed import MegatronMPU, initialize

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    mpu = MegatronMPU(parallel_state)
    replicas = parallel_state.get_data_parallel_group()
    try:
        torch.manual_seed(2)
        inner, outer = nn.Linear(DIM, 12, bias=False), nn.Linear(12, DIM, bias=False)
        dense = TokenMLP(nn.Sequential(inner, nn.Tanh(), outer))
        model = TokenMLP(ColumnThenRow(inner, outer, parallel_state.get_tensor_model_parallel_group()))
        for name in ("embedding", "head"):
            getattr(model, name).load_state_dict(getattr(dense, name).state_dict())
        block = {"size": size, "embeddings": ["embedding"], "optimizer": OPTIMIZER}
        config = Setup(stage=stage, size=None, clip=clip).config() | {"tokenized_attention": block}
        optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
        engine = initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
        reference = torch.optim.SGD(dense.parameters(), lr=SGD_RATE)
        for step in range(5):
            dense.zero_grad()
            pairs = [sequences(step, r) for r in (0, 1)]
            expected = sum(F.cross_entropy(dense(x).flatten(0, 1), y.flatten()) for x, y in pairs) / 2
            expected.backward()
            if clip:
                nn.utils.clip_grad_norm_(dense.parameters(), clip)
            reference.step()
            x, y = pairs[parallel_state.get_data_parallel_rank()]
            loss = F.cross_entropy(engine(x).flatten(0, 1), y.flatten())
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean, group=replicas)
            torch.testing.assert_close(mean / 2, expected.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.embedding.table.to_dense(), dense.embedding.weight.detach(), rtol=0, atol=1e-5)
        engine.destroy()
    finally:
        groups.mpu = None
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_beside_tensor_parallelism(engines_on: Any, stage: int) -> None:
    pytest.importorskip("megatron.core")
    engines_on(4).run(beside_tensor_parallelism, stage, 2, 0.0)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_clipping_counts_rows_once_under_tensor_parallelism(engines_on: Any, stage: int) -> None:
    pytest.importorskip("megatron.core")
    engines_on(4).run(beside_tensor_parallelism, stage, 1, 0.1)


class Embed(nn.Module):
    """A first stage: rows of the tokens, through one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.layer = nn.Linear(DIM, DIM)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(tokens)))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def in_a_pipeline(stage: int, clip: float, bare: bool) -> None:
    """Two stages x two data-parallel ranks, the table on the first stage only; `bare` makes the embedding a layer itself."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.utils import groups

    from ta_plugin.deepspeed import initialize

    torch.manual_seed(4)
    first: list[nn.Module] = [nn.Embedding(VOCAB, DIM), nn.Linear(DIM, DIM)] if bare else [Embed()]
    layers = [*first, nn.Linear(DIM, DIM), nn.Linear(DIM, VOCAB)]
    layers = layers if bare else [*layers[:1], nn.Identity(), *layers[1:]]
    dense = nn.Sequential(*copy.deepcopy(layers))
    model = PipelineModule(layers, num_stages=2, loss_fn=token_loss, partition_method="uniform", seed_layers=False)
    block = {"size": 2, "embeddings": ["*embedding", "0"], "optimizer": OPTIMIZER}
    setup = Setup(stage=stage, size=None, clip=clip, accumulate=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
    engine = initialize(model=model, optimizer=optimizer, config=setup.config() | {"tokenized_attention": block})[0]
    assert bool(engine.tokenized_attention.conversion.tables) == engine.is_first_stage()
    replica = engine.mpu.get_data_parallel_rank()
    reference = torch.optim.SGD(dense.parameters(), lr=SGD_RATE)
    for step in range(4):
        dense.zero_grad()
        expected = torch.zeros(())
        for micro in range(2):
            for rank in range(2):
                x, y = sequences(10 * step + micro, rank)
                loss = token_loss(dense(x), y) / 4
                loss.backward()
                expected += loss.detach()
        if clip:
            nn.utils.clip_grad_norm_(dense.parameters(), clip)
        reference.step()
        loss = engine.train_batch(iter([sequences(10 * step + micro, replica) for micro in range(2)]))
        torch.testing.assert_close(loss.reshape(()), expected, rtol=0, atol=1e-5)
    engine.destroy()
    groups.mpu = None  # the engine left its grid there, for the next one to find


@pytest.mark.parametrize("bare", [False, True], ids=["inside a layer", "as a layer"])
@pytest.mark.parametrize(("stage", "clip"), [(0, 0.0), (1, 0.0), (1, 0.1)])  # plain DeepSpeed clips wrong at (0, 0.1)
def test_in_a_pipeline(engines_on: Any, stage: int, clip: float, bare: bool) -> None:
    engines_on(4).run(in_a_pipeline, stage, clip, bare)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.moe = MoE(DIM, nn.Linear(DIM, DIM), num_experts=2, ep_size=2, k=1, capacity_factor=100.0, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)[0]


def beside_experts(stage: int, size: int | None) -> list[float]:
    """Losses of a mixture of experts whose embedding is sharded over `size` ranks, or by plain DeepSpeed with None."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from ta_plugin.deepspeed import initialize

    torch.manual_seed(5)
    model = TokenMLP(Experts())
    config = Setup(stage=stage, size=None).config()
    if size is not None:
        config["tokenized_attention"] = {"size": size, "embeddings": ["embedding"], "optimizer": OPTIMIZER}
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    engine = initialize(model=model, optimizer=torch.optim.SGD(groups, lr=SGD_RATE), config=config)[0]
    losses = []
    for step in range(5):
        x, y = sequences(step, dist.get_rank())
        loss = token_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_beside_experts(engines_on: Any, stage: int) -> None:
    plain = engines_on(4).run(beside_experts, stage, None)
    for size in (2, 4):
        torch.testing.assert_close(engines_on(4).run(beside_experts, stage, size), plain, rtol=0, atol=1e-5)


def causal_ulysses(size: int) -> None:
    """Outputs and gradients of this rank's chunk against causal attention over positions, in float64."""
    from ta_plugin.deepspeed import TokenizedUlyssesAttention

    group = SSPGroup(dist.group.WORLD if size > 1 else None)
    attention, g = TokenizedUlyssesAttention(causal=True), torch.Generator().manual_seed(1)
    attention.set_group(group, Scoring(), row_multiple=5)
    tokens, lengths = torch.randint(0, 5, (2, 8), generator=g), torch.tensor([8, 3])
    table = torch.randn(5, 2, 2, 4, generator=g, dtype=torch.float64).requires_grad_()
    queries = torch.randn(2, 8, 2, 4, generator=g, dtype=torch.float64).requires_grad_()
    k, v = table[tokens].unbind(2)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (queries, k, v)), attn_mask=mask).transpose(
        1, 2
    )
    expected = expected * (torch.arange(8) < lengths[:, None])[..., None, None]
    wanted = torch.autograd.grad(expected.sin().sum(), [queries, table])

    mine = slice(group.rank * 8 // size, (group.rank + 1) * 8 // size)
    k, v = table[tokens[:, mine]].unbind(2)
    got = attention(queries[:, mine], k, v, tokens[:, mine], lengths)
    torch.testing.assert_close(got, expected[:, mine], rtol=0, atol=1e-10)
    of_queries, of_table = torch.autograd.grad(got.sin().sum(), [queries, table])
    if size > 1:
        dist.all_reduce(of_table)
    torch.testing.assert_close(of_queries[:, mine], wanted[0][:, mine], rtol=0, atol=1e-10)
    torch.testing.assert_close(of_table, wanted[1], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="equal tokens have different hidden states"):
        other = TokenizedUlyssesAttention(causal=True)
        other.set_group(group, Scoring())
        other(queries[:, mine], queries[:, mine], v, tokens[:, mine], lengths)


def test_causal_ulysses_equals_attention_over_positions(engines_on: Any) -> None:
    causal_ulysses(1)
    engines_on(2).run(causal_ulysses, 2)


BAD_CHUNKS = {
    "rank 1 of 2: tokens is torch.int32": lambda x, tokens, lengths: (x, tokens.int(), lengths),
    "rank 1 of 2: q has shape (2, 3, 2, 4)": lambda x, tokens, lengths: (x[:, :3], tokens, lengths),
    "rank 1 of 2: lengths[0] is 9": lambda x, tokens, lengths: (x, tokens, lengths + 1),
    "tokens has shape (2, 4) on rank 0 but (2, 3)": lambda x, tokens, lengths: (x[:, :3], tokens[:, :3], lengths - 2),
    "lengths differ between rank 0 and rank 1": lambda x, tokens, lengths: (x, tokens, lengths - 1),
    "lengths differ": lambda x, tokens, lengths: (x, tokens, None),
}


def bad_chunks() -> list[str]:
    from ta_plugin.deepspeed import TokenizedUlyssesAttention

    attention, messages = TokenizedUlyssesAttention(), []
    attention.set_group(SSPGroup(dist.group.WORLD), Scoring())
    tokens, lengths, x = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([8, 3]), torch.ones(2, 4, 2, 4)
    for spoil in BAD_CHUNKS.values():
        x_given, *given = spoil(x, tokens, lengths) if dist.get_rank() == 1 else (x, tokens, lengths)
        with pytest.raises(ValueError) as caught:
            attention(x_given, x_given, x_given, *given)
        messages.append(str(caught.value))
        out = attention(x, x, x, tokens, lengths)
        expected = x * (dist.get_rank() * 4 + torch.arange(4) < lengths[:, None])[..., None, None]
        torch.testing.assert_close(out, expected)
    return messages


def test_a_bad_chunk_on_one_rank_of_ulysses_raises_on_both(engines_on: Any) -> None:
    first, second = engines_on(2).run(bad_chunks)
    assert first == second
    for message, says in zip(first, BAD_CHUNKS, strict=True):
        assert message.startswith(says)
