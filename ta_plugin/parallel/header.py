"""The fixed-size header that precedes every exchange, so that what is wrong on one rank raises on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ta_plugin.parallel.collectives import explained, gather_single
from ta_plugin.parallel.groups import SSPGroup

_FIELDS = 15
_MESSAGE_BYTES = 512


def exchange_header(group: SSPGroup, fields: Sequence[int], error: Exception | None = None) -> list[list[int]]:
    """All-gather up to 15 integers from every rank, and raise on every rank if any rank reports an error.

    Returns one list of the given length per rank, in rank order. `error` is what this rank's own checks found, or None;
    then every rank raises the same ValueError, which names the first rank that reported and repeats its message.
    """
    if group.size == 1:
        if error is not None:
            raise ValueError(str(error) or repr(error)) from error
        return [list(fields)]
    header = torch.zeros(_FIELDS + 1 + _MESSAGE_BYTES // 8, dtype=torch.int64)
    message = (str(error) or repr(error)).encode()[:_MESSAGE_BYTES] if error is not None else b""
    header[: len(fields)] = torch.tensor(list(fields), dtype=torch.int64)
    if message:
        header[_FIELDS] = len(message)
        padded = message.ljust(_MESSAGE_BYTES, b"\0")
        header[_FIELDS + 1 :] = torch.frombuffer(bytearray(padded), dtype=torch.int64)
    headers = _all_gather(header, group)
    for rank, length in enumerate(headers[:, _FIELDS].tolist()):
        if length:
            text = bytes(headers[rank, _FIELDS + 1 :].view(torch.uint8)[:length].tolist()).decode(errors="replace")
            raise ValueError(f"rank {rank} of {group.size}: {text}") from (error if rank == group.rank else None)
    return headers[:, : len(fields)].tolist()


def _all_gather(header: Tensor, group: SSPGroup) -> Tensor:
    mine = header.to(group.device)
    gathered = mine.new_empty(group.size * mine.numel())
    with explained("header", group):
        gather_single(gathered, mine, group.group)
    group.traffic.record("header", mine, (group.size - 1) * mine.numel())
    return gathered.view(group.size, -1).cpu()
