"""Decays per head: ALiBi's slopes, and one rule for learned ones at every width."""

from __future__ import annotations

import pytest
import torch

from ta_plugin.attention import HeadDecay, alibi_slopes


def test_alibi_slopes() -> None:
    torch.testing.assert_close(alibi_slopes(8), 0.5 ** torch.arange(1, 9))
    twelve = alibi_slopes(12)
    torch.testing.assert_close(twelve[:8], alibi_slopes(8))
    torch.testing.assert_close(twelve[8:], alibi_slopes(16)[:8:2])


@pytest.mark.parametrize("kind", ["alibi", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_costs_no_precision(kind: str, dtype: torch.dtype) -> None:
    decay = torch.nn.Sequential(HeadDecay(kind, 12)).to(dtype)[0]
    got = decay()
    assert got.dtype == (torch.float64 if kind == "learned" and dtype == torch.float64 else torch.float32)
    if kind == "alibi":
        assert torch.equal(got, alibi_slopes(12))
    else:
        torch.testing.assert_close(got.double(), decay.log_decay.double().exp(), rtol=1e-6, atol=0)
        got.sum().backward()
        torch.testing.assert_close(decay.log_decay.grad, got.detach().to(dtype), rtol=0, atol=0)


def test_learned_decays_start_from_alibi_which_moves_with_its_module_and_is_not_saved() -> None:
    torch.testing.assert_close(HeadDecay("learned", 12)(), alibi_slopes(12))
    assert HeadDecay("alibi", 12).to("meta")().device.type == "meta"
    assert not HeadDecay("alibi", 12).state_dict()


def test_slopes_are_float32_whatever_the_default_dtype() -> None:
    expected = alibi_slopes(12)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [alibi_slopes(12), HeadDecay("alibi", 12)(), HeadDecay("alibi", 12).double()()]
        learned = HeadDecay("learned", 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == torch.float32 and torch.equal(x, expected) for x in found)
    assert learned.log_decay is not None and learned.log_decay.dtype == torch.bfloat16  # as any parameter


@pytest.mark.parametrize("kind", ["alibi", "learned"])
def test_parts_are_the_heads_of_their_ranks(kind: str) -> None:
    parts = [HeadDecay(kind, 12, part=part, parts=3)() for part in range(3)]
    torch.testing.assert_close(torch.cat(parts), HeadDecay(kind, 12)(), rtol=0, atol=0)
    assert HeadDecay("none", 4)() is None
    with pytest.raises(ValueError, match="decay is 'rope'; pass 'none'"):
        HeadDecay("rope", 4)
