"""The genome model's global attention is plain attention over every visible k-mer of the genome."""

from __future__ import annotations

import torch
from oracle import attention_over_positions

from ta_plugin.data.genome import Genome
from ta_plugin.models.genome import GenomeModel

LENGTH, FLANK = 4, 10


def genome(k: int = 3) -> Genome:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 4, (n,), generator=generator, dtype=torch.uint8) for n in (150, 40)]
    parts[0][70] = 4
    return Genome.of({"a": parts[0], "b": parts[1]}, k)


def model_of(data: Genome, **options: bool) -> GenomeModel:
    torch.manual_seed(1)
    return GenomeModel(data.kmers, data.k, dim=16, num_heads=2, layers=2, **options).double()


def test_global_attention_equals_attention_over_every_visible_position() -> None:
    data = genome()
    starts = data.spans(5, LENGTH, 0, 190, torch.Generator().manual_seed(2))
    model = model_of(data)
    visible = data.rows[~data.hidden(starts, LENGTH)]
    rows = visible[visible >= 0]
    assert 100 < rows.numel() < data.num_occurrences  # the spans took some

    def through(attend: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        model.attend = attend  # type: ignore[method-assign]
        logits = model(data.windows(starts, LENGTH, FLANK), data.counts_without(starts, LENGTH), LENGTH)
        logits.square().sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return attention_over_positions(q, k[rows], v[rows])

    ours, our_grads = through(model.attend)
    theirs, their_grads = through(plain)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    for mine, plain_grad in zip(our_grads, their_grads, strict=True):
        assert torch.allclose(mine, plain_grad, rtol=0, atol=1e-10)


def test_logits_do_not_depend_on_what_is_hidden() -> None:
    data = genome(k=2)  # all 16 occur, whatever the spans hold
    starts = torch.tensor([20, 22, 100])
    model = model_of(data)
    bases = data.bases.clone()
    for start in starts.tolist():
        bases[start : start + LENGTH] = 3 - bases[start : start + LENGTH]
    other = Genome.of({"a": bases[:150], "b": bases[151:]}, 2)
    assert torch.equal(other.kmers, data.kmers) and not torch.equal(other.counts, data.counts)
    results = [model(x.windows(starts, LENGTH, FLANK), x.counts_without(starts, LENGTH), LENGTH) for x in (data, other)]
    assert torch.equal(*results)


def test_without_global_attention_counts_do_nothing() -> None:
    data = genome()
    starts = torch.tensor([20, 100])
    windows = data.windows(starts, LENGTH, FLANK)
    for use in (True, False):
        model = model_of(data, global_attention=use)
        torch.nn.init.normal_(model.of_kmer)
        same = torch.equal(model(windows, data.counts, LENGTH), model(windows, data.counts**2, LENGTH))
        assert same is not use
