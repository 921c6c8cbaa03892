"""What an older position loses per head in causal attention: ALiBi's slopes, or rates learned from there on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

DecayKind = Literal["none", "alibi", "learned"]


class HeadDecay(nn.Module):
    """The decay that `causal_attention` takes, (H,) per position, in float32 or wider whatever dtype the module is cast to.

    kind:  "none"; "alibi", its fixed slopes; "learned", one per head from those slopes on, held as its logarithm
    part, parts: of the heads, where they are split over ranks

    Raises ValueError for another kind.
    """

    slopes: Tensor | None

    def __init__(self, kind: DecayKind, num_heads: int, *, part: int = 0, parts: int = 1) -> None:
        super().__init__()
        if kind not in get_args(DecayKind):
            raise ValueError(f"decay is {kind!r}; pass 'none', 'alibi' or 'learned'")
        slopes = alibi_slopes(num_heads).chunk(parts)[part]
        self.log_decay = nn.Parameter(slopes.log().to(torch.get_default_dtype())) if kind == "learned" else None
        self.register_buffer("slopes", slopes if kind == "alibi" else None, persistent=False)
        self._fixed = slopes.tolist()

    def forward(self) -> Tensor | None:
        """(H,) or None."""
        if self.log_decay is None:
            return self.slopes
        # an exponential in bfloat16 would be off by up to 1/256: a position in 256
        return self.log_decay.to(torch.promote_types(self.log_decay.dtype, torch.float32)).exp()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HeadDecay:
        super()._apply(fn, recurse)
        if self.slopes is not None:  # moves with the module, but is not rounded with it
            self.slopes = torch.tensor(self._fixed, dtype=torch.float32, device=self.slopes.device)
        return self


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """(num_heads,) float32 slopes of ALiBi (Press et al. 2022, section 3): 2 ** (-8 n / H), n = 1 .. H.

    For a number of heads that is no power of two, those of the power below it and every other one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * n / power) for n in range(1, power + 1)]
    slopes += [2.0 ** (-4 * n / power) for n in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)
