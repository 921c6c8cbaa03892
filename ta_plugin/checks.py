"""What a batch must look like; each check raises a ValueError that names the argument, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, x: object) -> None:
    """A torch.Tensor: no list and no array of numpy."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; pass a tensor (`torch.as_tensor({name})`)")


def check_int64(name: str, x: Tensor, dim: int, shape: str | None = None) -> None:
    """A tensor of int64 with `dim` dimensions; `shape` says which."""
    check_tensor(name, x)
    if x.dtype != torch.int64:
        raise ValueError(f"{name} is {x.dtype}; pass int64 (`{name}.long()`)")
    if x.dim() != dim:
        wanted = shape or f"{dim} dimension{'s' if dim > 1 else ''}"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; pass {wanted}")


def check_grid(name: str, tokens: Tensor, device: torch.device) -> None:
    """Something (B, L) int64 on `device`."""
    check_int64(name, tokens, 2, "(batch_size, length)")
    if tokens.device.type != device.type:
        raise ValueError(
            f"{name} is on {tokens.device}, the group exchanges on {device}; move it with `{name}.to('{device}')`"
        )


def check_tokens(
    name: str,
    tokens: Tensor,
    device: torch.device,
    vocab_size: int | None,
    lengths: Tensor | None,
    shape: tuple[int, int] | None = None,
    read: bool = True,
) -> None:
    """Ids (B, L) int64 on `device`, of `shape` where one is required, valid up to `lengths` (B,). Without `read` no values are."""
    check_grid(name, tokens, device)
    if shape is not None and tuple(tokens.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tokens.shape)}, but batch_size and sequence_length are {shape}; pad a short batch with "
            "samples of length 0, and construct TokenizedAttention for another shape"
        )
    if lengths is not None:
        check_length_grid("lengths", lengths, tokens.shape[0], device)
    if not read:
        return
    valid = tokens
    if lengths is not None:
        past = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        valid = tokens.masked_fill(past, 0)  # what lies past a length is never read
    if valid.numel() == 0:
        check_lengths("lengths", lengths, tokens.shape[0], tokens.shape[1], device)
        return
    ends = [*valid.aminmax(), *(() if lengths is None else lengths.aminmax())]
    smallest, largest, *extents = torch.stack(ends).tolist()  # one wait for the device
    if extents and not 0 <= extents[0] <= extents[1] <= tokens.shape[1]:
        check_lengths("lengths", lengths, tokens.shape[0], tokens.shape[1], device)
    if smallest < 0:
        where = (valid == smallest).nonzero()[0].tolist()
        raise ValueError(f"{name}{where} is {smallest}; ids are 0 or larger (exclude padding with lengths)")
    if vocab_size is not None and largest >= vocab_size:
        where = (valid == largest).nonzero()[0].tolist()
        raise ValueError(f"{name}{where} is {largest}, but vocab_size is {vocab_size}; ids must lie below it")


def check_lengths(name: str, lengths: Tensor | None, batch: int, longest: int, device: torch.device) -> None:
    """Lengths (B,) int64 in [0, longest], or None."""
    if lengths is None:
        return
    check_length_grid(name, lengths, batch, device)
    bad = ((lengths < 0) | (lengths > longest)).nonzero()
    if bad.numel():
        sample = int(bad[0])
        raise ValueError(f"{name}[{sample}] is {int(lengths[sample])}; it must lie in [0, {longest}]")


def check_length_grid(name: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    """What `check_lengths` tells without waiting for the device."""
    check_tensor(name, lengths)
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ValueError(f"{name} is {lengths.dtype} of shape {tuple(lengths.shape)}; pass int64 of shape ({batch},)")
    if lengths.device.type != device.type:
        raise ValueError(f"{name} is on {lengths.device}; move it to {device}")


def check_cutoffs(cutoffs: Tensor | None, targets: Tensor, tokens: Tensor) -> None:
    """Cutoffs (B, T) int64 of targets (B, T, ...), or None."""
    if cutoffs is None:
        return
    check_tensor("target_cutoffs", cutoffs)
    if cutoffs.dtype != torch.int64 or cutoffs.shape != targets.shape[:2]:
        expected = tuple(targets.shape[:2])
        raise ValueError(
            f"target_cutoffs is {cutoffs.dtype} of shape {tuple(cutoffs.shape)}; pass int64 of shape {expected}"
        )
    if cutoffs.device != tokens.device:
        raise ValueError(f"target_cutoffs is on {cutoffs.device}, tokens on {tokens.device}; move one to the other")


def check_queries(queries: Tensor, tokens: Tensor) -> None:
    """Query embeddings (B, T, E) floating on the tokens' device."""
    check_tensor("queries", queries)
    if queries.dim() != 3 or not queries.is_floating_point():
        raise ValueError(f"queries is {queries.dtype} of shape {tuple(queries.shape)}; pass floating (B, T, E)")
    if queries.device != tokens.device:
        raise ValueError(f"queries is on {queries.device}, tokens on {tokens.device}; move one to the other")


def check_side(name: str, side: Tensor | None, tokens: Tensor, heads: set[int], trailing: int = 0) -> None:
    """A per-occurrence input: (B, L) or (B, L, heads); with trailing=1 (B, L, heads, Dv)."""
    if side is None:
        return
    check_tensor(name, side)
    lead = tuple(tokens.shape)
    dims = {3 + trailing} if trailing else {2, 3}
    fits = side.dim() in dims and tuple(side.shape[:2]) == lead and (side.dim() == 2 or side.shape[2] in heads)
    if not fits or not side.is_floating_point():
        shapes = [(*lead, h, "Dv") if trailing else (*lead, h) for h in sorted(heads)] + ([] if trailing else [lead])
        wanted = " or ".join("(" + ", ".join(map(str, shape)) + ")" for shape in shapes)
        raise ValueError(f"{name} is {side.dtype} of shape {tuple(side.shape)}; pass floating {wanted}")
    if side.device != tokens.device:
        raise ValueError(f"{name} is on {side.device}, tokens on {tokens.device}; move one to the other")
