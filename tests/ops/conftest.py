from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from ta_plugin.ops import load_op, operators

DEVICES = os.environ.get("TA_TEST_DEVICES", "cpu cuda" if torch.cuda.is_available() else "cpu").split()


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, with every operator compiled for it."""
    device: str = request.param
    for name in operators():
        op = load_op(name, device=device)  # type: ignore[arg-type]
        assert op.implementation == "compiled", op.reason
    return device


@pytest.fixture(scope="session")
def compiled(device: str) -> Callable[[str], Any]:
    """compiled(name): the operator under torch.ops.ta_plugin."""
    return lambda name: getattr(torch.ops.ta_plugin, name)


@pytest.fixture(scope="session")
def plain() -> Callable[[str], Any]:
    """plain(name): the operator in plain torch."""
    return lambda name: operators()[name].plain
