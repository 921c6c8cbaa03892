"""Causal attention with rotary positions within a sliding window: what stands between token-keyed layers in a mixed stack."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ta_plugin.ops.connect import connect
from ta_plugin.strategies import Halo
from ta_plugin.unique_space import UniqueSpace


class RotaryAttention(nn.Module):
    """Causal self-attention over positions: each sees itself and the window - 1 before it in its sample, or all where window is None.

    Rotary embeddings as in RoFormer (Su et al. 2021), halves rotated together.
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_kv_heads: int | None = None, window: int | None = None, base: float = 1e4
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; pass 1 or more, or None for no limit")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.window, self.base = dim // num_heads, window, base
        if self.head_dim % 2:
            raise ValueError(f"dim is {dim} with {num_heads} heads; rotary positions need an even head_dim")
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * self.num_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, space: UniqueSpace, cache: WindowCache | None = None) -> Tensor:
        """hidden (M, dim) packed as the occurrences of `space` -> (M, dim). cache: to be filled with the prompt."""
        positions = space.positions()
        q, k, v = self._project(hidden, positions)
        if cache is not None:
            cache.prefill(space, k, v)
        bounds = space.cu_occurrences
        attended = self._whole(q, k, v, bounds) if self.window is None else self._windowed(q, k, v, bounds, self.window)
        return self.output(attended.flatten(1))

    def over_ranks(self, hidden: Tensor, halo: Halo) -> Tensor:
        """hidden (M, dim) of this rank's pieces of a sequence -> (M, dim); `halo` reaches window - 1 back. Collective."""
        assert self.window is not None
        q, k, v = self._project(hidden, halo.plan.positions())
        keys, values = halo.extend(torch.stack([k, v], 1), "window").unbind(1)
        out = self._windowed(halo.spread(q), keys, values, halo.cu_seqlens, self.window)
        return self.output(out.index_select(0, halo.own).flatten(1))

    def step(self, hidden: Tensor, cache: WindowCache) -> Tensor:
        """The next position of each sample, hidden (B, dim) -> (B, dim)."""
        q, k, v = self._project(hidden, cache.lengths)
        keys, values, seen = cache.append(k, v)
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen[:, None, None], enable_gqa=True
        )
        return self.output(out.flatten(1))

    def _project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        q = self.query(hidden).view(rows, self.num_heads, self.head_dim)
        k, v = self.key_value(hidden).view(rows, 2, self.num_kv_heads, self.head_dim).unbind(1)
        return rotate(q, positions, self.base), rotate(k, positions, self.base), v

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        pieces = []
        for start, stop in pairwise(bounds.tolist()):
            if stop > start:
                piece = [x[None, start:stop].transpose(1, 2) for x in (q, k, v)]
                out = F.scaled_dot_product_attention(piece[0], piece[1], piece[2], is_causal=True, enable_gqa=True)
                pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces) if pieces else q

    def _windowed(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int) -> Tensor:
        count = q.shape[0]
        blocks = -(-count // window)  # a block of `window` queries sees itself and the block before
        if blocks == 0:  # on one of several ranks: backward of what brought k and v must still run
            return connect(q, k, v)
        padding = blocks * window - count
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).view(blocks, window, *x.shape[1:]) for x in (q, k, v))
        k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x], 1) for x in (k, v))
        place = torch.arange(blocks * window, device=q.device).view(blocks, window)
        key = torch.cat([place - window, place], 1)
        begin = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=count)
        begin = F.pad(begin, (0, padding), value=count).view(blocks, window)
        # padded queries see themselves only, so that no row of the softmax is empty
        seen = (key[:, None] <= place[..., None]) & (key[:, None] > place[..., None] - window)
        seen &= key[:, None] >= begin.minimum(place)[..., None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[:count]


def rotate(x: Tensor, positions: Tensor, base: float = 1e4) -> Tensor:
    """Rotary embedding of x (M, H, D) at positions (M,), angles in float32 or wider."""
    half = x.shape[2] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = positions.to(wide)[:, None, None] * frequency
    a, b = x.to(wide).split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class WindowCache:
    """The last `window` keys and values of B samples, in a ring; all of them where window is None."""

    def __init__(self, batch: int, window: int | None, device: torch.device | None = None) -> None:
        self.window = window
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @torch.no_grad()
    def prefill(self, space: UniqueSpace, k: Tensor, v: Tensor) -> None:
        """Take over a prompt's k, v (M, Hk, D)."""
        self.lengths = space.cu_occurrences.diff()
        self._reserve(k, 0)
        assert self.keys is not None and self.values is not None
        sample, place = space.sample_of_occurrences(), space.positions()
        kept = place >= self.lengths[sample] - self.keys.shape[1]
        at = (sample[kept], place[kept] % self.keys.shape[1])
        self.keys[at], self.values[at] = k[kept], v[kept]

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take k, v (B, Hk, D) of the next position -> keys, values (B, W, Hk, D) and which of them exist (B, W)."""
        self._reserve(k, 1)
        assert self.keys is not None and self.values is not None
        width = self.keys.shape[1]
        sample = torch.arange(k.shape[0], device=k.device)
        self.keys[sample, self.lengths % width], self.values[sample, self.lengths % width] = k, v
        self.lengths = self.lengths + 1
        return self.keys, self.values, torch.arange(width, device=k.device) < self.lengths[:, None]

    def _reserve(self, k: Tensor, more: int) -> None:
        """Room for `more` positions of each sample. Reads the device only where there is no window."""
        width = self.window
        if width is None:
            rows = more + (int(self.lengths.max()) if self.lengths.numel() else 0)
            width = max(64, 1 << (rows - 1).bit_length())
        if self.keys is None or self.values is None:
            self.keys, self.values = (k.new_zeros(self.lengths.numel(), width, *k.shape[1:]) for _ in range(2))
        elif self.keys.shape[1] < width:
            missing = (0, 0, 0, 0, 0, width - self.keys.shape[1])
            self.keys, self.values = F.pad(self.keys, missing), F.pad(self.values, missing)
