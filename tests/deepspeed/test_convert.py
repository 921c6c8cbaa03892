"""What the block does to a model, and what it leaves alone and why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import DIM, LENGTH, VOCAB, Setup, batch, build_engine, build_models, train_dense, train_engine
from torch import Tensor, nn

from ta_plugin import ShardedTokenEmbedding, SSPGroup, TokenizedAttention
from ta_plugin.deepspeed.config import TokenizedAttentionConfig
from ta_plugin.deepspeed.convert import convert
from ta_plugin.deepspeed.ulysses import TokenizedUlyssesAttention
from ta_plugin.embedding import SharedEmbedding


class Encoder(nn.Module):
    """Two layers of torch's encoder over token embeddings, with or without positions."""

    def __init__(self, positions: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout, batch_first=True)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
        self.position = nn.Embedding(LENGTH, DIM) if positions else None
        self.head = nn.Linear(DIM, 1)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.position is not None:
            x = x + self.position.weight
        mask = torch.arange(ids.shape[1]) >= lengths[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask)
        return (self.head(x).squeeze(-1).masked_fill(mask, 0.0)).square().sum() / 10


def multihead_equals_plain(stage: int, row_multiple: int) -> None:
    torch.manual_seed(3)
    model = Encoder()
    plain = copy.deepcopy(model)
    block = {"modules": ["layers.*.self_attn"], "tokens": "ids", "lengths": "lengths", "row_multiple": row_multiple}
    setup = Setup(stage=stage, sgd=True, block=block)
    engine = build_engine(model, setup)
    changed = dict(engine.tokenized_attention.conversion.changed)
    assert changed["layers.0.self_attn"] == "MultiheadAttention attends over distinct tokens of 'ids'"
    reference = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(4):
        plain.zero_grad()
        expected = []
        for rank in range(dist.get_world_size()):
            ids, lengths, *_ = batch(step, rank)
            loss = plain(ids, lengths.clamp(min=1))
            (loss / dist.get_world_size()).backward()
            expected.append(loss.item())
        reference.step()
        ids, lengths, *_ = batch(step, dist.get_rank())
        loss = engine(ids, lengths=lengths.clamp(min=1))
        engine.backward(loss)
        engine.step()
        torch.testing.assert_close(loss.item(), expected[dist.get_rank()], rtol=1e-5, atol=1e-5)
    space = model.layers[0].self_attn._plan.space
    rows = space.num_rows - space.spare_rows
    assert rows < int(lengths.clamp(min=1).sum()), "the batch repeats no token: nothing was folded"
    assert space.num_rows % row_multiple == 0 and bool(space.spare_rows) == (row_multiple > 1)
    engine.destroy()


@pytest.mark.parametrize(("stage", "row_multiple"), [(0, 1), (2, 1), (3, 1), (1, 32)])
def test_multihead_attention_equals_plain(engines_on: Any, stage: int, row_multiple: int) -> None:
    engines_on(2).run(multihead_equals_plain, stage, row_multiple)


def positions_are_found() -> str:
    model = Encoder(positions=True)
    block = {"modules": ["layers.*.self_attn"], "tokens": "ids", "lengths": "lengths"}
    engine = build_engine(model, Setup(block=block))
    ids = torch.zeros(3, LENGTH, dtype=torch.int64)
    if dist.get_rank() == 0:  # only rank 1 repeats a token
        ids += torch.arange(LENGTH)
    with pytest.raises(ValueError) as caught:
        engine(ids, torch.full((3,), LENGTH))
    return str(caught.value)


def test_positions_below_are_an_error_on_every_rank(engines_on: Any) -> None:
    messages = engines_on(2).run(positions_are_found)
    assert all("rank 1 of 2: equal tokens have different hidden states" in message for message in messages)


def evaluates_alone_first(positions: bool) -> list[str]:
    block = {"modules": ["layers.*.self_attn"], "tokens": "ids", "lengths": "lengths"}
    model = Encoder(positions=positions)
    engine = build_engine(model, Setup(block=block))
    ids, lengths = torch.zeros(3, LENGTH, dtype=torch.int64), torch.full((3,), LENGTH)
    raised = []
    for alone in (True, False):
        if alone and dist.get_rank() == 0:
            continue
        try:
            with torch.set_grad_enabled(not alone):
                (model if alone else engine)(ids, lengths)
        except ValueError as error:
            raised.append(str(error))
    engine.destroy()
    return raised


def checks_once_where_nobody_trains() -> int:
    model = Encoder()
    engine = build_engine(
        model, Setup(block={"modules": ["layers.*.self_attn"], "tokens": "ids", "lengths": "lengths"})
    )
    ids, lengths = torch.zeros(3, LENGTH, dtype=torch.int64), torch.full((3,), LENGTH)
    compare, asked = torch.allclose, []
    torch.allclose = lambda *args, **options: asked.append(0) or compare(*args, **options)
    try:
        with torch.no_grad():
            model(ids, lengths)
            first = len(asked)
            model(ids, lengths)
    finally:
        torch.allclose = compare
    engine.destroy()
    assert len(asked) == first
    return first


def test_evaluation_checks_a_module_once(engines_on: Any) -> None:
    assert min(engines_on(2).run(checks_once_where_nobody_trains)) > 0


def test_a_rank_that_evaluates_alone_checks_alone(engines_on: Any) -> None:
    assert engines_on(2).run(evaluates_alone_first, False) == [[], []]
    what = "equal tokens have different hidden states"
    (together,), (alone, also_together) = engines_on(2).run(evaluates_alone_first, True)
    assert alone.startswith(what)
    assert together == also_together and together.startswith(f"rank 0 of 2: {what}")


def masks_without_lengths() -> None:
    torch.manual_seed(3)
    model = Encoder()
    plain = copy.deepcopy(model)
    engine = build_engine(model, Setup(block={"modules": ["layers.*.self_attn"], "tokens": "ids"}))
    assert len(engine.tokenized_attention.conversion.changed) == 2
    ids, lengths, *_ = batch(0, dist.get_rank())
    lengths = lengths.clamp(min=1, max=LENGTH - 1)
    torch.testing.assert_close(engine(ids, lengths), plain(ids, lengths))
    engine.destroy()


def test_a_mask_that_the_block_does_not_name_is_heeded(engines_on: Any) -> None:
    engines_on(2).run(masks_without_lengths)


BAD_GRIDS = {
    "ids is torch.int32": lambda ids, mask: (ids.int(), mask),
    f"ids has shape (3, {LENGTH}, 1)": lambda ids, mask: (ids[..., None], mask),
    f"lengths has shape (3, {LENGTH - 1})": lambda ids, mask: (ids, mask[:, 1:]),
    "lengths has valid slots behind padding": lambda ids, mask: (ids, mask.flip(1)),
    "lengths is torch.int64 of shape (2,)": lambda ids, mask: (ids, mask.sum(1)[1:]),
    f"lengths lie in [1, {LENGTH + 1}]": lambda ids, mask: (ids, torch.tensor([1, 2, LENGTH + 1])),
    "lengths is a list": lambda ids, mask: (ids, mask.tolist()),
}


def bad_grids(size: int) -> list[str]:
    """What rank 1's bad batches raise here; good batches train in between, and without gradients a rank evaluates alone."""
    block = {"modules": ["layers.*.self_attn"], "tokens": "ids", "lengths": "lengths"}
    model = Encoder()
    engine = build_engine(model, Setup(size=size, block=block))
    good, lengths, *_ = batch(0, dist.get_rank())
    mask = torch.arange(LENGTH) < torch.tensor([[1], [2], [LENGTH - 1]])
    messages = []
    for spoil in BAD_GRIDS.values():
        ids, bad = spoil(good, mask) if dist.get_rank() == 1 else (good, lengths)
        with pytest.raises(ValueError) as caught:
            engine(ids, bad)
        messages.append(str(caught.value))
        engine.backward(engine(good, lengths.clamp(min=1)))
        engine.step()
    with torch.no_grad():
        if dist.get_rank() == 1:
            model(good, lengths)
            with pytest.raises(ValueError, match=r"^ids is torch.int32"):
                model(good.int(), lengths)
    engine.destroy()
    return messages


@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_grid_on_one_rank_raises_on_every_rank(engines_on: Any, size: int) -> None:
    first, second = engines_on(2).run(bad_grids, size)
    assert first == second
    for message, says in zip(first, BAD_GRIDS, strict=True):
        assert message.startswith(f"rank 1 of 2: {says}"), message


def what_is_left() -> None:
    block = {"modules": ["*"], "tokens": "ids", "lengths": "lengths"}
    engine = build_engine(Encoder(dropout=0.1), Setup(block=block))
    left = dict(engine.tokenized_attention.conversion.left)
    assert "dropout is 0.1" in left["layers.0.self_attn"]
    assert "neither an nn.MultiheadAttention nor" in left["head"]
    assert "left layers.1.self_attn: dropout" in str(engine.tokenized_attention.conversion)
    with pytest.raises(ValueError, match=r'inexact is "error".*dropout'):
        build_engine(Encoder(dropout=0.1), Setup(block={**block, "inexact": "error"}))
    with pytest.raises(ValueError, match="matches no module"):
        build_engine(Encoder(), Setup(block={**block, "modules": ["decoder.*"]}))
    with pytest.raises(ValueError, match="no argument 'tokens'"):
        build_engine(Encoder(), Setup(block={**block, "modules": ["layers.*.self_attn"], "tokens": "tokens"}))


def test_what_is_left_and_why(engines_on: Any) -> None:
    engines_on(2).run(what_is_left)


class TwoUses(nn.Module):
    """An attention whose nn.Embedding the model also calls itself."""

    def __init__(self, tie: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM, **options)
        self.attention = TokenizedAttention(3, LENGTH, 1, self.embedding, vocab_size=VOCAB)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.attention(tokens, lengths) + self.embedding(tokens)).square().mean()


def embeddings_used_twice() -> None:
    torch.manual_seed(0)
    model = TwoUses()
    plain = copy.deepcopy(model)
    engine = build_engine(model, Setup(strategy="gather"))
    assert (
        "name it in tokenized_attention.embeddings"
        in dict(engine.tokenized_attention.conversion.left)["attention.embedding_fn"]
    )
    assert model.attention.embedding_fn is model.embedding
    tokens, lengths, *_ = batch(0, dist.get_rank())
    expected = engine(tokens, lengths)

    engine = build_engine(plain, Setup(strategy="gather", block={"embeddings": ["embedding"]}))
    assert plain.attention.embedding_fn is plain.embedding.table
    assert not engine.tokenized_attention.conversion.left
    torch.testing.assert_close(engine(tokens, lengths), expected)
    for options, reason in (
        ({"padding_idx": 0}, "padding_idx"),
        ({"max_norm": 1.0}, "max_norm"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"tie": True}, "tied to head.weight"),
    ):
        engine = build_engine(TwoUses(**options), Setup(block={"embeddings": ["embedding"]}))
        assert reason in dict(engine.tokenized_attention.conversion.left)["embedding"]


def test_an_embedding_the_model_calls_too(engines_on: Any) -> None:
    engines_on(2).run(embeddings_used_twice)


def ids_outside() -> str:
    model = TwoUses()
    engine = build_engine(model, Setup(block={"embeddings": ["embedding"]}))
    ids = torch.tensor([[VOCAB if dist.get_rank() == 1 else 0]])
    with pytest.raises(ValueError) as caught:
        engine.module.embedding(ids)
    return str(caught.value)


def test_ids_outside_the_vocabulary_raise_on_every_rank(engines_on: Any) -> None:
    assert all(f"rank 1 of 2: id {VOCAB} is outside" in message for message in engines_on(2).run(ids_outside))


def unregistered_table(stage: int) -> None:
    """A table that its attention only borrows is found, sharded and trained, as in the recommender."""
    model, dense = build_models(sgd=True)
    table = model.attention.embedding_fn
    del model.attention.embedding_fn
    model.attention.embedding_fn = SharedEmbedding(table)
    setup = Setup(stage=stage, sgd=True, steps=4)
    engine = build_engine(model, setup)
    assert table.rows.shape[0] < VOCAB
    expected = train_dense(dense, setup, world=dist.get_world_size())
    torch.testing.assert_close(train_engine(engine, setup), expected, rtol=0, atol=1e-5)
    engine.destroy()


def test_a_borrowed_table_trains(engines_on: Any) -> None:
    engines_on(2).run(unregistered_table, 1)


class HasRegroup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.group: Any = None

    def regroup(self, group: Any) -> None:
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum()


def other_modules_are_regrouped() -> None:
    model = HasRegroup()
    engine = build_engine(model, Setup(size=2))
    assert model.group is engine.tokenized_attention.group and model.group.size == 2
    engine.destroy()


def test_a_module_with_regroup_gets_the_group(engines_on: Any) -> None:
    engines_on(2).run(other_modules_are_regrouped)


def tables_of_another_size() -> None:
    table = ShardedTokenEmbedding(VOCAB, DIM, dist.group.WORLD)
    model = nn.Sequential(nn.Linear(2, 1))
    model.table = table
    with pytest.raises(ValueError, match=r"sharded over 2 ranks, but tokenized_attention.size makes groups of 1"):
        build_engine(model, Setup(size=1))
    with pytest.raises(ValueError, match="score has parameters"):
        model = nn.Sequential(nn.Linear(2, 1))
        model.attention = TokenizedAttention(1, 2, 1, nn.Embedding(3, 4), score=nn.Linear(4, 1))
        build_engine(model, Setup(stage=3))


def test_what_cannot_be_is_refused(engines_on: Any) -> None:
    engines_on(2).run(tables_of_another_size)


def replicas_differ() -> None:
    """Replicas drawn from different seeds start from the same rows, as DeepSpeed's broadcast makes parameters."""
    model = nn.Sequential(nn.Linear(2, 1))
    model.table = ShardedTokenEmbedding(VOCAB, DIM, seed=dist.get_rank())
    engine = build_engine(model, Setup(size=1))
    first = model.table.rows.clone()
    dist.broadcast(first, 0)
    assert torch.equal(model.table.rows, first)
    engine.destroy()


def test_replicas_start_equal(engines_on: Any) -> None:
    engines_on(2).run(replicas_differ)


class EveryKind(nn.Module):
    """Attention of each kind that the block reaches."""

    def __init__(self, built: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.multihead = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.ulysses = TokenizedUlyssesAttention()
        self.tokenized = TokenizedAttention(
            2, LENGTH, 1, nn.Embedding(VOCAB, DIM), layout="sequence", deterministic=built
        )

    def forward(self, ids: Tensor) -> None:
        x = self.embedding(ids)
        self.multihead(x, x, x, need_weights=False)
        self.ulysses(*[x.unflatten(2, (2, -1))] * 3, ids)
        self.tokenized(ids, torch.full((2,), LENGTH))


@pytest.mark.parametrize(
    "written, built, expected",
    [
        (None, True, [True] * 3),
        (None, False, [True, True, False]),
        (False, True, [False] * 3),
        (True, False, [True] * 3),
    ],
)
def test_deterministic_reaches_the_kernel(
    monkeypatch: pytest.MonkeyPatch, written: bool | None, built: bool, expected: list[bool]
) -> None:
    block = TokenizedAttentionConfig(deterministic=written, modules=["multihead"], tokens="ids", layout="sequence")
    model, alone, asked = EveryKind(built), SSPGroup(None), []
    convert(model, block, alone, alone)

    def record(q: Tensor, k: Tensor, v: Tensor, *_: Any, deterministic: bool, **__: Any) -> tuple[Tensor, Tensor]:
        asked.append(deterministic)
        return v.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[:2])

    monkeypatch.setattr("ta_plugin.attention.scoring.weighted_attention", record)
    model(torch.zeros(2, LENGTH, dtype=torch.int64))
    assert asked == expected
