"""How fast the GPU backends were measured: what `choose` ranks them by.

TFLOP/s of forward and backward together (4 n^2 h d and 2.5 times that), bf16, 16 heads, torch 2.11.0+cu130, flash-attn-4 4.0.0b36
(csrc/weighted_attention/NOTES.md). Ours and flash-attn-4 without weights: one call on an H100, in turns (forward 10, backward 10), but
flash-attn-4 at 1k, where that call waits for its launches: an earlier one behind a busy queue. flash-attn-4 with weights at 16k, and
FlexAttention: one H200, at one length each, taken for all. `gpu` says so for each.
"""

from __future__ import annotations

from bisect import bisect_left

KEYS = (1024, 4096, 16384)  # a sample has about so many keys
DIMS = (64, 128)

ON_H200 = (("flash4", True), ("flex", True))  # (backend, weighted) that were timed there; all others on an H100

# (backend, weighted, deterministic): for each of DIMS, at each of KEYS
RATES: dict[tuple[str, bool, bool], tuple[tuple[int, ...], ...]] = {
    ("hopper", True, False): ((394, 545, 587), (468, 624, 645)),
    ("hopper", True, True): ((368, 505, 537), (448, 573, 576)),
    ("flash4", False, False): ((389, 541, 571), (475, 632, 666)),
    ("flash4", False, True): ((370, 508, 560), (436, 579, 622)),
    ("flash4", True, False): ((409, 409, 409), (472, 472, 472)),
    ("flex", True, False): ((337, 337, 337), (350, 350, 350)),
}


def rate(name: str, weighted: bool, deterministic: bool, head_dim: int, keys: int) -> float | None:
    """TFLOP/s of a backend for calls like this one, less what padding head_dim wastes; None where nothing was measured."""
    # our kernel without weights is at least as fast as with them, FlexAttention has one backward, repeatable but for the weights'
    options = (weighted, True) if name == "hopper" else (weighted,)
    modes = (deterministic, False) if name == "flex" else (deterministic,)
    table = next((RATES[name, w, d] for w in options for d in modes if (name, w, d) in RATES), None)
    if table is None or head_dim > DIMS[-1]:
        return None
    column = min(bisect_left(KEYS, keys / 2), len(KEYS) - 1)
    at = next(i for i, d in enumerate(DIMS) if d >= head_dim)
    return table[at][column] * head_dim / DIMS[at]


def gpu(name: str, weighted: bool) -> str:
    """Which GPU the figures that `rate` gives for such calls are of."""
    return "H200" if (name, weighted) in ON_H200 else "H100"
