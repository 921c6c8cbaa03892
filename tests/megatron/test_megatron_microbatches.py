"""A bad microbatch of one pipeline stage, or one too few, raises on every rank before the schedule begins; then training goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dense_model import DenseModel, Sizes, microbatch
from layouts import Layout, build, megatron
from ranks import RankPool

from ta_plugin.megatron import CheckedMicrobatches, check_microbatches

SIZES = Sizes()
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def bad_label(batches: list[Batch]) -> None:
    batches[2] = (*batches[2][:2], torch.full_like(batches[2][0], SIZES.vocab))


def no_grid_of_labels(batches: list[Batch]) -> None:
    batches[0] = (*batches[0][:2], batches[0][0].flatten())


def bad_id(batches: list[Batch]) -> None:
    batches[3][0][0, 0] = -2


def bad_length(batches: list[Batch]) -> None:
    batches[1][1][0] = SIZES.length + 1


def one_less(batches: list[Batch]) -> None:
    batches.pop()


SPOIL: dict[Callable[[list[Batch]], None], str] = {
    bad_label: "rank 1 of 2: microbatch 2: labels holds 60, but the output has 60 ids",
    no_grid_of_labels: "rank 1 of 2: microbatch 0: labels is torch.int64 of shape (36,)",
    bad_id: "rank 1 of 2: microbatch 3: tokens[0, 0] is -2",
    bad_length: "rank 1 of 2: microbatch 1: lengths[0] is 13",
    one_less: "rank 0 has 4 microbatches, rank 1 of 2 3; give every rank as many",
}


def checked_steps(layout: Layout) -> tuple[list[str], list[float | None]]:
    """What each spoilt step raises here, and the losses of the good steps between. The last stage, rank 1, has the bad batch."""
    messages, losses = [], []
    with megatron(layout) as groups:
        run = build(layout, groups)
        for step, spoil in enumerate(SPOIL):
            last = groups.pp.rank() == 1
            batches: list[Batch] = [microbatch(SIZES, step, i) for i in range(SIZES.microbatches)]
            batches = [(tokens, lengths, labels if last else None) for tokens, lengths, labels in batches]
            check_microbatches(batches, SIZES.vocab)
            losses.append(run.step(step)[0])
            if last:
                spoil(batches)
            try:
                check_microbatches(batches, SIZES.vocab)
            except ValueError as error:
                messages.append(str(error))
    return messages, losses


def test_a_bad_microbatch_of_one_stage_raises_on_every_stage(megatron_ranks: Callable[[int], RankPool]) -> None:
    (first, _), (second, losses) = megatron_ranks(2).run(checked_steps, Layout(pp=2))
    assert first == second and len(first) == len(SPOIL)
    for message, says in zip(first, SPOIL.values(), strict=True):
        assert message.startswith(says)
    expected, _ = DenseModel(SIZES).train(len(SPOIL))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


def hooked_steps(layout: Layout) -> tuple[list[str], list[float | None]]:
    """As `checked_steps`, by the schedule's hook alone: every second step's microbatches are bad on the last stage."""
    messages, losses = [], []
    with megatron(layout) as groups:
        run = build(layout, groups)
        last, batches = groups.pp.rank() == 1, []
        for step, spoil in enumerate((bad_label, bad_length)):
            good = [microbatch(SIZES, step, i) for i in range(SIZES.microbatches)]
            bad = [(tokens.clone(), lengths.clone(), labels) for tokens, lengths, labels in good]
            if last:
                spoil(bad)
            batches += [good, bad]
        given = CheckedMicrobatches(
            ({"text": each} for step in batches for each in step),
            SIZES.vocab,
            lambda: SIZES.microbatches,
            read=lambda each: each["text"],
        )
        run.chunks[0].config.no_sync_func = given.begin_step
        for step in range(len(batches)):
            try:
                losses.append(run.step(step, (each["text"] for each in given))[0])
            except ValueError as error:
                messages.append(str(error))
    return messages, losses


def test_the_schedules_hook_checks_a_step_before_it_begins(megatron_ranks: Callable[[int], RankPool]) -> None:
    (first, _), (second, losses) = megatron_ranks(2).run(hooked_steps, Layout(pp=2))
    assert first == second and len(first) == 2
    for message, says in zip(first, (SPOIL[bad_label], SPOIL[bad_length]), strict=True):
        assert message.startswith(says)
    expected, _ = DenseModel(SIZES).train(2)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


def test_evaluation_is_not_checked_and_nothing_is_lost() -> None:
    batches = [microbatch(SIZES, 0, i) for i in range(4)]
    batches[0] = (batches[0][0] + SIZES.vocab, *batches[0][1:])  # ids that a check would refuse
    given = CheckedMicrobatches(iter(batches), SIZES.vocab, lambda: 2)
    with torch.no_grad(), given.begin_step():
        assert next(given) is batches[0]
    with given.begin_step(), given.begin_step():
        assert [next(given) is each for each in batches[1:]] == [True] * 3


def test_one_process_checks_alone() -> None:
    good = microbatch(SIZES, 0, 0)
    check_microbatches([good, (*good[:2], None)], SIZES.vocab)
