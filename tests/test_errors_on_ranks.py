"""What is wrong on one rank raises the same ValueError on every rank, within seconds, and the group stays usable."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool, at_most
from torch import nn

from ta_plugin import TokenizedAttention, create_ssp_group

RANKS = at_most(4)
CULPRIT = RANKS // 2
WHO = f"rank {CULPRIT} of {RANKS}: "
BATCH, LENGTH, TARGETS, VOCAB, EMBED, HEADS = 2, 5, 3, 50, 8, 2
LIMIT_S = 10


def attention(strategy: str, **options: Any) -> TokenizedAttention:
    torch.manual_seed(0)
    maps = {name: nn.Linear(EMBED, EMBED) for name in ("query", "key", "value")}
    return TokenizedAttention(
        BATCH, LENGTH, RANKS, nn.Embedding(VOCAB, EMBED), vocab_size=VOCAB, num_heads=HEADS, strategy=strategy,
        **(maps | options),
    )  # fmt: skip


def good_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return {
        "tokens": torch.randint(0, 4, (BATCH, LENGTH), generator=generator),
        "lengths": torch.tensor([LENGTH, 3]),
        "targets": torch.randint(0, VOCAB, (BATCH, TARGETS), generator=generator),
        "bias": torch.zeros(BATCH, LENGTH),
    }


def spoil(batch: dict[str, Any], change: str) -> None:
    at = {
        "negative id": lambda: batch["tokens"].index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(-4)),
        "large id": lambda: batch["tokens"].index_put_((torch.tensor(0), torch.tensor(4)), torch.tensor(VOCAB)),
        "negative target": lambda: batch["targets"].index_put_((torch.tensor(1), torch.tensor(0)), torch.tensor(-1)),
        "long length": lambda: batch.update(lengths=torch.tensor([2, LENGTH + 1])),
        "negative length": lambda: batch.update(lengths=torch.tensor([-1, 2])),
        "int32 tokens": lambda: batch.update(tokens=batch["tokens"].int()),
        "int32 lengths": lambda: batch.update(lengths=batch["lengths"].int()),
        "another B": lambda: batch.update({name: x[:1] for name, x in batch.items()}),
        "another L": lambda: batch.update(tokens=batch["tokens"][:, :4], bias=batch["bias"][:, :4]),
        "another B of targets": lambda: batch.update(targets=batch["targets"][:1]),
        "no bias": lambda: batch.update(bias=None),
        "no targets": lambda: batch.update(targets=None),
        "one more argument": lambda: batch.update(value_term=torch.zeros(BATCH, LENGTH, HEADS, EMBED // HEADS)),
        "bias per head": lambda: batch.update(bias=torch.zeros(BATCH, LENGTH, HEADS)),
        "bias of another dtype": lambda: batch.update(bias=batch["bias"].double()),
        "bias that learns": lambda: batch.update(bias=batch["bias"].requires_grad_()),
        "bias of another shape": lambda: batch.update(bias=torch.zeros(BATCH, LENGTH + 1)),
        "no gradients": lambda: torch.set_grad_enabled(False),
        "no tensor": lambda: batch.update(tokens=batch["tokens"].tolist()),
        "flat targets": lambda: batch.update(targets=batch["targets"].flatten()),
        "no lengths": lambda: batch.update(lengths=None),
        "cutoffs without targets": lambda: batch.update(targets=None, target_cutoffs=torch.zeros(2, 3).long()),
        "multiplier under softmax": lambda: batch.update(multiplier=torch.ones(BATCH, LENGTH)),
    }
    at[change]()


MESSAGES = {  # argument, value and remedy
    "negative id": [WHO, "tokens[1, 2] is -4", "exclude padding with lengths"],
    "large id": [WHO, "tokens[0, 4] is 50", "vocab_size is 50", "must lie below it"],
    "negative target": [WHO, "targets[1, 0] is -1", "ids are 0 or larger"],
    "long length": [WHO, "lengths[1] is 6", "must lie in [0, 5]"],
    "negative length": [WHO, "lengths[0] is -1", "must lie in [0, 5]"],
    "int32 tokens": [WHO, "tokens is torch.int32", "`tokens.long()`"],
    "int32 lengths": [WHO, "lengths is torch.int32", "pass int64"],
    "another B": [WHO, "tokens has shape (1, 5)", "(2, 5)", "samples of length 0"],
    "another L": [WHO, "tokens has shape (2, 4)", "(2, 5)"],
    "another B of targets": [WHO, "targets are for 1 samples, tokens for 2", "one row per sample"],
    "no bias": [f"bias differs between rank 0 and rank {CULPRIT}", "pass the same on every rank"],
    "no targets": [f"targets differs between rank 0 and rank {CULPRIT}", "pass the same on every rank"],
    "one more argument": [f"value_term differs between rank 0 and rank {CULPRIT}", "pass the same on every rank"],
    "bias per head": [f"bias differs between rank 0 and rank {CULPRIT}", "width"],
    "bias of another dtype": [f"bias differs between rank 0 and rank {CULPRIT}", "dtype"],
    "bias that learns": [f"bias differs between rank 0 and rank {CULPRIT}", "requires_grad"],
    "bias of another shape": [WHO, "bias is torch.float32 of shape (2, 6)", "pass floating"],
    "no gradients": [
        f"parameters that train differ between rank 0 and rank {CULPRIT}",
        "torch.no_grad()",
        "freeze the same",
    ],
    "no tensor": [WHO, "tokens is a list", "torch.as_tensor(tokens)"],
    "flat targets": [WHO, f"targets has shape ({BATCH * TARGETS},)", "pass (batch_size, length)"],
    "no lengths": [WHO, "lengths is None", "pass (B,) int64"],
    "cutoffs without targets": [WHO, "target_cutoffs is given without targets", "pass targets"],
    "multiplier under softmax": [WHO, "multiplier is given with normaliser='softmax'", "as bias"],
}


def failure_of(call: Any) -> str:
    """The message of the ValueError that call() raises, in time."""
    start = time.monotonic()
    try:
        call()
    except ValueError as error:
        assert time.monotonic() - start < LIMIT_S
        return str(error)
    raise AssertionError("no ValueError")


def still_works(model: TokenizedAttention) -> None:
    out = model(**good_batch())
    out.sum().backward()
    assert torch.isfinite(out).all()
    total = torch.ones(())
    dist.all_reduce(total)
    assert float(total) == RANKS


def bad_batches(strategy: str, changes: list[str], options: dict[str, Any]) -> list[str]:
    model, messages = attention(strategy, **options), []
    for change in changes:
        batch = good_batch()
        if dist.get_rank() == CULPRIT:
            spoil(batch, change)
        messages.append(failure_of(lambda batch=batch: model(**batch)))
        torch.set_grad_enabled(True)
        still_works(model)
    return messages


def bad_construction(change: dict[str, Any]) -> str:
    sizes: dict[str, Any] = {"batch_size": BATCH, "sequence_length": LENGTH, "nranks": RANKS}
    sizes["embedding_fn"] = nn.Embedding(VOCAB, EMBED)
    if dist.get_rank() == CULPRIT:
        sizes |= change
    message = failure_of(lambda: TokenizedAttention(**sizes))
    still_works(attention("gather"))
    return message


def wrong_size_everywhere() -> str:
    group = create_ssp_group(RANKS // 2)
    message = failure_of(lambda: TokenizedAttention(BATCH, LENGTH, RANKS, nn.Embedding(VOCAB, EMBED), group=group))
    return message


def frozen_on_one_rank(name: str) -> str:
    model = attention("gather", output=nn.Linear(EMBED, 3))
    if dist.get_rank() == CULPRIT:
        getattr(model, name).requires_grad_(False)
    message = failure_of(lambda: model(**good_batch()))
    getattr(model, name).requires_grad_(True)
    still_works(model)
    getattr(model, name).requires_grad_(False)  # on every rank: that is fine
    still_works(model)
    return message


def one_rank_alone() -> str:
    """The culprit builds for one rank and exchanges nothing; the others wait for it until the group's time is up."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == CULPRIT:
        TokenizedAttention(BATCH, LENGTH, 1, nn.Embedding(VOCAB, EMBED))
        time.sleep(4)
        return ""
    with pytest.raises(RuntimeError) as caught:
        TokenizedAttention(BATCH, LENGTH, RANKS, nn.Embedding(VOCAB, EMBED), group=group)
    return "".join(caught.value.__notes__)


class BreaksOnOneRank(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == CULPRIT:
            raise KeyError("row 7 is not in the store")
        return super().forward(ids)


def one_rank_breaks() -> str:
    """No header can tell what an embedding_fn will do: the others wait, and say for what."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = TokenizedAttention(BATCH, LENGTH, RANKS, BreaksOnOneRank(VOCAB, EMBED), group=group)
    with pytest.raises((RuntimeError, KeyError)) as caught:
        model(**good_batch())
    if dist.get_rank() == CULPRIT:
        time.sleep(4)
    return "".join(getattr(caught.value, "__notes__", []))


def bad_embed() -> str:
    model = attention("gather")
    ids = torch.zeros(2, 3, dtype=torch.int64)
    ids[0, 1] = -7 if dist.get_rank() == CULPRIT else 7
    message = failure_of(lambda: model.embed(ids))
    still_works(model)
    return message


@pytest.mark.parametrize(("strategy", "layout"), [("gather", "sample"), ("owner", "sample"), ("owner", "sequence")])
def test_a_bad_batch_on_one_rank_raises_on_every_rank(rank_pools: Any, strategy: str, layout: str) -> None:
    by_rank = rank_pools(RANKS).run(bad_batches, strategy, list(MESSAGES), {"layout": layout})
    for change, *messages in zip(MESSAGES, *by_rank, strict=True):
        assert len(set(messages)) == 1, (change, messages)
        for fragment in MESSAGES[change]:
            assert fragment in messages[0], (change, messages[0])


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"nranks": 7}, [WHO, f"nranks is 7, but the group has {RANKS} rank(s)", f"pass nranks={RANKS}"]),
        ({"batch_size": 3}, [f"batch_size is 2 on rank 0 but 3 on rank {CULPRIT}", "pass the same"]),
        ({"sequence_length": 9}, [f"sequence_length is 5 on rank 0 but 9 on rank {CULPRIT}", "pass the same"]),
        ({"num_heads": 4}, [f"num_heads is 1 on rank 0 but 4 on rank {CULPRIT}", "pass the same"]),
        ({"vocab_size": 9}, [f"vocab_size is 50 on rank 0 but 9 on rank {CULPRIT}", "pass the same"]),
        ({"strategy": "owner"}, [f"strategy is auto on rank 0 but owner on rank {CULPRIT}", "pass the same"]),
        ({"strategy": "ring"}, [WHO, "strategy is 'ring' in layout 'sample'", "choose one of"]),
        ({"layout": "sequence"}, [f"layout is sample on rank 0 but sequence on rank {CULPRIT}", "pass the same"]),
        ({"layout": "stripes"}, [WHO, "layout is 'stripes'", "choose one of"]),
        ({"layout": "sequence", "strategy": "gather"}, ["strategy is 'gather' in layout 'sequence'", "'ring'"]),
        ({"num_heads": 2, "num_kv_heads": 3}, [WHO, "num_kv_heads is 3", "does not divide"]),
        ({"batch_size": 2.0}, [WHO, "batch_size is 2.0", "pass an int"]),
        ({"vocab_size": VOCAB + 1}, [WHO, f"vocab_size is {VOCAB + 1}, but embedding_fn has {VOCAB} ids"]),
        ({"embedding_fn": None}, [WHO, "embedding_fn is None; pass what maps ids to rows"]),
        ({"backend": "flash"}, [WHO, "backend is 'flash'; choose one of"]),
    ],
)
def test_sizes_that_differ_at_construction_raise_on_every_rank(
    rank_pools: Any, change: dict[str, Any], fragments: list[str]
) -> None:
    messages = rank_pools(RANKS).run(bad_construction, change)
    assert len(set(messages)) == 1
    assert all(fragment in messages[0] for fragment in fragments), messages[0]


def test_a_group_of_another_size_is_refused(rank_pools: Any) -> None:
    for message in rank_pools(RANKS).run(wrong_size_everywhere):
        half = RANKS // 2
        assert f"nranks is {RANKS}, but the group has {half} rank(s); pass nranks={half}" in message


@pytest.mark.parametrize("name", ["projections", "output", "embedding_fn"])
def test_parameters_frozen_on_one_rank_raise_on_every_rank(rank_pools: Any, name: str) -> None:
    messages = rank_pools(RANKS).run(frozen_on_one_rank, name)
    assert len(set(messages)) == 1
    assert f"parameters that train differ between rank 0 and rank {CULPRIT}" in messages[0]


def test_who_waits_in_vain_says_for_what(rank_pools: Any) -> None:
    for rank, note in enumerate(rank_pools(RANKS).run(one_rank_alone)):
        assert rank == CULPRIT or ("in 'header'" in note and "TokenizedAttention with nranks=1" in note)
    for rank, note in enumerate(rank_pools(RANKS).run(one_rank_breaks)):
        assert rank == CULPRIT or (
            "in 'history.rows'" in note and "raised an error of its own (an embedding_fn" in note
        )


def test_bad_ids_to_embed_raise_on_every_rank(rank_pools: Any) -> None:
    messages = rank_pools(RANKS).run(bad_embed)
    assert len(set(messages)) == 1
    assert messages[0].startswith(WHO + "ids[0, 1] is -7")


def test_without_torch_distributed_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"nranks is {RANKS}, but the group has 1.*initialise torch.distributed"):
        attention("gather")


def test_what_owner_cannot_do_is_refused() -> None:
    model = TokenizedAttention(BATCH, LENGTH, 1, nn.Embedding(VOCAB, EMBED), strategy="owner")
    tokens, lengths = torch.zeros(BATCH, LENGTH, dtype=torch.int64), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="as many queries as keys; pass strategy='gather' or 'auto'"):
        model(tokens, lengths)
    with pytest.raises(ValueError, match="strategy is 'ring' in layout 'sample'; choose one of"):
        TokenizedAttention(BATCH, LENGTH, 1, nn.Embedding(VOCAB, EMBED), strategy="ring")


def fails_alone() -> None:
    assert dist.get_rank() != 1, "what was wrong"
    time.sleep(90)


def test_a_rank_that_fails_is_reported_though_others_wait() -> None:
    pool, begin = RankPool(2), time.monotonic()
    try:
        with pytest.raises(AssertionError, match=r"(?s)rank 0:\ndid not answer within .*rank 1:\n.*what was wrong"):
            pool.run(fails_alone)
    finally:
        pool.close()
    assert time.monotonic() - begin < 80  # starting included
