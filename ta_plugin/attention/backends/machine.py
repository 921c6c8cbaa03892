"""What the choice of a backend depends on besides the call: the device, and what is installed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata

import torch

FLASH4 = "flash-attn-4"


@dataclass(frozen=True)
class Machine:
    """kind: "cpu", "cuda", ...; capability: of the GPU; missing: backends that cannot run here, each with why and the remedy."""

    kind: str
    capability: tuple[int, int] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device, build: bool = True) -> Machine:
        """As it is here. With `build` our kernel is loaded, and built if need be (a minute, once); without, only looked for."""
        if device.type != "cuda":
            return cls(device.type)
        capability = torch.cuda.get_device_capability(device.index)
        return _in_use(capability) if build else _cuda(capability, build)


@cache  # asked at every call of attention
def _in_use(capability: tuple[int, int]) -> Machine:
    return _cuda(capability, build=True)


def _cuda(capability: tuple[int, int], build: bool) -> Machine:
    missing = {}
    if capability == (9, 0):
        why = _hopper(build)
        if why is not None:
            missing["hopper"] = why
    try:
        metadata.version(FLASH4)
    except metadata.PackageNotFoundError:
        missing["flash4"] = f"{FLASH4} is not installed (pip install {FLASH4}==4.0.0b36)"
    return Machine("cuda", capability, missing)


def _hopper(build: bool) -> str | None:
    from ta_plugin.attention.backends.hopper import extension
    from ta_plugin.ops.builder import missing_extension, spec_of

    return extension().reason if build else missing_extension(spec_of("ta_weighted_attention"))
