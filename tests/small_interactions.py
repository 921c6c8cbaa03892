"""A small data set for tests, in RecBole's format."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_interactions(path: Path, users: int = 24, items: int = 30) -> Path:
    """A small .inter file in which users come back to the items they like."""
    random = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        liked = random.choice(items, 8)
        for event in range(random.integers(6, 20)):
            lines.append(
                f"u{user}\ti{random.choice(liked)}\t{random.integers(1, 6)}\t{1000 * event + random.integers(0, 900)}"
            )
    path.write_text("\n".join(lines) + "\n")
    return path
