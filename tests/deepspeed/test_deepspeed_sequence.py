"""TokenizedAttention over chunks on Ulysses' ranks, turned on by the block, against one dense process."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from engines import DIM, SGD_RATE, VOCAB, Setup
from oracle import attention_over_positions
from torch import Tensor, nn

from ta_plugin import TokenizedAttention

BATCH, CHUNKS = 2, (5, 3)  # uneven: rank 0 of a pair reads 5 positions, rank 1 three
LONG = sum(CHUNKS)
OPTIMIZER = {"type": "sgd", "lr": SGD_RATE}


class Classifier(nn.Module):
    """Predicts a label at every position of a sequence, or of this rank's chunk of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        maps = {name: nn.Linear(DIM, DIM, bias=name != "key") for name in ("query", "key", "value", "output")}
        self.attention = TokenizedAttention(BATCH, width, 1, nn.Embedding(VOCAB, DIM), num_heads=2, **maps)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.attention(tokens, lengths))


def dense_losses(model: Classifier, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of the loss of a whole batch, by attention over positions."""
    attention, total = model.attention, torch.zeros(())
    for x, n, y in zip(tokens, lengths.tolist(), labels, strict=True):
        rows = attention.embedding_fn(x[:n])
        p = attention.projections
        mixed = attention_over_positions(p.queries(rows), *p.keys_values(rows)).flatten(1)
        total = total + F.cross_entropy(model.head(attention.output(mixed)), y[:n], reduction="sum")  # type: ignore[misc]
    return total


def sequences(step: int, replica: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + replica)
    tokens = (torch.rand(BATCH, LONG, generator=g) ** 2 * VOCAB).long()
    lengths = torch.randint(1, LONG + 1, (BATCH,), generator=g)
    return tokens, lengths, (3 * tokens + 1) % VOCAB


@contextmanager
def ulysses(size: int) -> Any:
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
    from deepspeed.utils import groups

    mpu.initialize_sequence_parallel(size)
    try:
        yield mpu
    finally:
        mpu._release_sequence_parallel_groups()
        groups.mpu = None


def train(stage: int, block: dict[str, Any]) -> None:
    from ta_plugin.deepspeed import initialize, sequence_parallel_loss

    with ulysses(2) as mpu:
        rank = dist.get_rank()
        part, replica = rank % 2, rank // 2
        torch.manual_seed(1)
        model = Classifier(CHUNKS[part])
        torch.manual_seed(1)
        dense = Classifier(LONG)
        config = Setup(stage=stage, size=None).config() | {
            "tokenized_attention": {"layout": "sequence", "optimizer": OPTIMIZER, **block}
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=SGD_RATE)
        engine = initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]
        assert model.attention.layout == "sequence"
        assert model.attention.group.size == 2
        reference = torch.optim.SGD(dense.parameters(), lr=SGD_RATE)
        first = sum(CHUNKS[:part])
        for step in range(6):
            dense.zero_grad()
            batches = [sequences(step, r) for r in (0, 1)]
            expected = torch.stack([dense_losses(dense, *b) / (BATCH * LONG) for b in batches]).mean()
            expected.backward()
            reference.step()
            tokens, lengths, labels = batches[replica]
            mine = slice(first, first + CHUNKS[part])
            count = (lengths - first).clamp(0, CHUNKS[part])
            logits = engine(tokens[:, mine], count)
            inside = torch.arange(CHUNKS[part]) < count[:, None]
            target = labels[:, mine].masked_fill(~inside, -100)
            total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
            loss = total * 2 / (BATCH * LONG)  # of the mean over both ranks' losses
            engine.backward(sequence_parallel_loss(engine, loss))
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 4, expected.detach(), rtol=0, atol=1e-5)
        table = next(iter(engine.tokenized_attention.conversion.tables.values()))
        torch.testing.assert_close(table.to_dense(), dense.attention.embedding_fn.weight.detach(), rtol=0, atol=1e-5)
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_chunks_train_as_whole_sequences(engines_on: Any, stage: int) -> None:
    engines_on(4).run(train, stage, {"strategy": "ring"} if stage == 0 else {})


def refusals() -> list[str]:
    from ta_plugin.deepspeed import initialize

    messages = []
    with ulysses(2) as mpu:
        for block, layout in (
            ({"layout": "sequence", "size": 4}, "sample"),
            ({"layout": "sample"}, "sequence"),
            ({"layout": "sequence", "strategy": "gather"}, "sample"),
            ({"layout": "sample", "strategy": "ring"}, "sample"),
        ):
            model = Classifier(4)
            model.attention.layout = layout  # type: ignore[assignment]
            config = Setup(size=None).config() | {"tokenized_attention": block}
            try:
                initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config, mpu=mpu)
            except ValueError as error:
                messages.append(str(error))
    return messages


def test_what_would_mistake_chunks_for_samples_is_refused(engines_on: Any) -> None:
    for size, layout, gather, ring in engines_on(4).run(refusals):
        assert "attention is a TokenizedAttention over chunks on ranks [" in size
        assert "leave size out, or set it to 2" in size
        assert 'attention has layout "sequence", and tokenized_attention.layout is "sample"' in layout
        assert "strategy is 'gather' in layout 'sequence'" in gather
        assert "strategy is 'ring' in layout 'sample'" in ring
