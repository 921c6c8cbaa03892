"""Token-keyed layers and mixed stacks: exact for what they define, and decoded step by step from distinct tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ta_plugin import SSPGroup, UniqueSpace
from ta_plugin.attention import CausalChunks
from ta_plugin.models import token_keyed
from ta_plugin.models.decode_cache import DecodeCache
from ta_plugin.models.mixed_decoder import MixedDecoder, MixedDecoderConfig
from ta_plugin.models.rotary import RotaryAttention, WindowCache
from ta_plugin.models.token_keyed import TokenKeyedAttention
from ta_plugin.routing import HashOwners
from ta_plugin.strategies import CausalRows, causal_over_ranks, pieces_of


def text(length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Tokens by Zipf."""
    share = 1.0 / torch.arange(1, vocabulary + 1)
    return torch.multinomial(share, length, replacement=True, generator=torch.Generator().manual_seed(seed))


def by_positions(layer: TokenKeyedAttention, hidden: Tensor, embedded: Tensor, tokens: Tensor) -> Tensor:
    """One document, keys and values at every position."""
    heads, kv_heads, length = layer.num_heads, layer.num_kv_heads, hidden.shape[0]
    normed = layer.norm(embedded)
    q, k = layer.query(hidden).view(length, heads, -1), layer.key(normed).view(length, kv_heads, -1)
    v = (layer.value(normed) if layer.value is not None else layer.value_table(tokens)).view(length, kv_heads, -1)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    place = torch.arange(length)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    decay = layer.decay()
    if decay is not None:
        scores = scores - decay[:, None, None] * (place[:, None] - place)
    share = scores.masked_fill(place[:, None] < place, -torch.inf).softmax(-1)
    return layer.output(torch.einsum("hij,jhd->ihd", share, v).flatten(1))


@pytest.mark.parametrize("decay", ["none", "alibi", "learned"])
@pytest.mark.parametrize("value_vocab", [None, 20])
def test_layer_equals_attention_over_positions(decay: str, value_vocab: int | None) -> None:
    torch.manual_seed(0)
    tokens = text(70, 20)
    layer = TokenKeyedAttention(24, 4, num_kv_heads=2, token_dim=10, value_vocab=value_vocab, decay=decay).double()
    hidden = torch.randn(70, 24, dtype=torch.float64, requires_grad=True)
    table = torch.randn(20, 10, dtype=torch.float64, requires_grad=True)
    space = UniqueSpace.from_packed(tokens)
    got = layer(hidden, table[space.tokens], CausalChunks.of(space, 16))
    want = by_positions(layer, hidden, table[tokens], tokens)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(want)
    inputs = [hidden, table, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [1, 5, 200])
def test_rotary_window_equals_a_mask(window: int) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 17, 17, 18, 53])
    space = UniqueSpace.from_packed(text(53, 9), bounds)
    windowed = RotaryAttention(16, 2, num_kv_heads=1, window=window).double()
    hidden = torch.randn(53, 16, dtype=torch.float64)
    q, k, v = windowed._project(hidden, space.positions())
    place, sample = torch.arange(53), space.sample_of_occurrences()
    age = place[:, None] - place
    seen = (age >= 0) & (age < window) & (sample[:, None] == sample)
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    want = windowed.output(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1).flatten(1))
    torch.testing.assert_close(windowed(hidden, space), want, rtol=1e-10, atol=1e-10)
    if window == 200:
        windowed.window = None
        torch.testing.assert_close(windowed(hidden, space), want, rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    layer = RotaryAttention(8, 1).double()
    x = torch.randn(1, 8, dtype=torch.float64).expand(2, 8)
    scores = [(q[1] * k[0]).sum() for q, k, _ in (layer._project(x, torch.tensor(p)) for p in ((3, 8), (90, 95)))]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=1e-12)
    assert (
        scores[0] - layer._project(x, torch.tensor((3, 9)))[0][1] @ layer._project(x, torch.tensor((3, 9)))[1][0].T
    ).abs().max() > 1e-6


@pytest.mark.parametrize("decay", ["none", "learned"])
def test_decoding_2000_tokens_equals_the_parallel_forward(decay: str) -> None:
    torch.manual_seed(0)
    vocabulary, length = 300, 2000
    config = MixedDecoderConfig(vocabulary, dim=16, num_layers=2, num_heads=2, global_every=2, window=32, decay=decay)
    model = MixedDecoder(config).double()
    tokens = text(length, vocabulary)
    with torch.no_grad():
        expected = model(tokens, plan=model.plan(tokens, chunk=128))
        cache = model.cache(1)
        decoded = torch.cat([model.step(tokens[i : i + 1], cache) for i in range(length)])
    torch.testing.assert_close(decoded, expected, rtol=1e-10, atol=1e-10)
    distinct = tokens.unique().numel()
    assert int(cache.tokens.sizes) == distinct
    held = cache.tokens.layer(1).keys
    assert held is not None and distinct <= held.shape[1] < 2 * distinct  # grows with distinct tokens, not with length


def test_decoding_goes_on_after_a_prompt() -> None:
    torch.manual_seed(0)
    config = MixedDecoderConfig(
        50,
        dim=16,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        global_every=2,
        window=6,
        value_tables=True,
        decay="alibi",
    )
    model = MixedDecoder(config).double()
    a, b = text(90, 50, 1), text(90, 50, 2)
    with torch.no_grad():
        expected = [model(x) for x in (a, b)]
        for first, second in ((20, 45), (0, 1), (30, 30)):
            cache = model.cache(2)
            prompt = torch.cat([a[:first], b[:second]])
            given = model(prompt, torch.tensor([0, first, first + second]), cache=cache)
            torch.testing.assert_close(given, torch.cat([expected[0][:first], expected[1][:second]]))
            for i in range(40):
                got = model.step(torch.stack([a[first + i], b[second + i]]), cache)
                torch.testing.assert_close(got[0], expected[0][first + i], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(got[1], expected[1][second + i], rtol=1e-10, atol=1e-10)


def test_a_windows_cache_is_no_business_of_the_hosts() -> None:
    meta = torch.device("meta")
    cache, new = WindowCache(2, 4, meta), torch.empty(2, 1, 8, device=meta)
    keys, values, seen = cache.append(new, new)
    assert keys.shape == values.shape == (2, 4, 1, 8) and seen.shape == (2, 4)


@pytest.mark.parametrize("window", [3, None])
def test_decoding_no_samples(window: int | None) -> None:
    model = MixedDecoder(MixedDecoderConfig(30, dim=32, num_layers=2, num_heads=2, global_every=2, window=window))
    none = torch.zeros(0, dtype=torch.int64)
    caches = model.cache(0)
    assert model.step(none, caches).shape == model.step(none, caches).shape == (0, 30)


def test_the_layers_options_reach_attention_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    reader = pieces_of(torch.arange(4).view(1, 2, 2), torch.full((1, 2), 2))
    plan = CausalRows.of(reader, HashOwners(1), SSPGroup(None))

    def spy(*args: Any, **options: Any) -> Any:
        given.update(options)
        return causal_over_ranks(*args, **options)

    monkeypatch.setattr(token_keyed, "causal_over_ranks", spy)
    layer = TokenKeyedAttention(16, 2, decay="alibi", deterministic=False, backend="reference")
    layer.over_ranks(torch.randn(4, 16), torch.randn(4, 16), plan)
    assert given["deterministic"] is False and given["backend"] == "reference" and given["decay"] is not None


def test_mixed_stack_is_causal_and_learns() -> None:
    torch.manual_seed(0)
    model = MixedDecoder(MixedDecoderConfig(30, dim=32, num_layers=3, num_heads=2, global_every=3, window=4))
    assert [isinstance(x.attention, TokenKeyedAttention) for x in model.layers] == [False, False, True]
    tokens = text(128, 30)
    changed = tokens.clone()
    changed[100:] = (changed[100:] + 1) % 30
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:100], model(changed)[:100])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens)[:-1], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.7


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="num_kv_heads is 3"):
        TokenKeyedAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="decay is 'rope'"):
        TokenKeyedAttention(16, 4, decay="rope")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window is 0"):
        RotaryAttention(16, 4, window=0)
    cache = DecodeCache(2, 10)
    with pytest.raises(ValueError, match="tokens lie in"):
        cache.append(torch.tensor([1, 10]))
    with pytest.raises(ValueError, match="one per sample"):
        cache.append(torch.tensor([1]))
    cache.append(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="to a new cache"):
        cache.prefill(UniqueSpace.from_packed(torch.tensor([1, 2]), torch.tensor([0, 1, 2])))
