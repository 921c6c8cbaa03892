"""The unique space of the current batch, for attention modules that see hidden states but no token ids."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ta_plugin.checks import check_grid, check_length_grid, check_tensor
from ta_plugin.parallel import SSPGroup, exchange_header
from ta_plugin.unique_space import UniqueSpace


class TokenPlan:
    """Built from the arguments of the model's forward, before it runs; read by the modules that share it.

    tokens:  name of the argument that holds ids (B, L) int64
    lengths: name of the argument that holds lengths (B,) or a mask (B, L) of valid slots; None: every slot is valid
    group:   whose ranks train together: what one of them finds wrong raises on all
    verify:  the first time a module asks, check on every rank that equal tokens have equal hidden states; where a rank evaluates
             alone, it checks for itself
    row_multiple: modules run on a multiple of so many rows, spare ones included
    """

    def __init__(
        self, tokens: str, lengths: str | None, group: SSPGroup, *, verify: bool, row_multiple: int = 1
    ) -> None:
        self.tokens, self.lengths, self.group, self.row_multiple = tokens, lengths, group, row_multiple
        self.space: UniqueSpace | None = None
        self.first_slots: Tensor | None = None
        self._verified: set[tuple[int, bool]] | None = set() if verify else None  # modules, and whether alone
        self._alone = False  # in a call of the followed model that others need not make

    def follow(self, model: nn.Module) -> None:
        """Rebuild the plan from every call of `model`.

        With gradients on, calls are collective and a ValueError about the batch of one rank raises on all, which would wait for it in
        backward otherwise. Without, a rank may evaluate alone.
        """
        signature = inspect.signature(model.forward)
        for name in (self.tokens, self.lengths):
            if name is not None and name not in signature.parameters:
                raise ValueError(
                    f"{type(model).__name__}.forward has no argument {name!r}; it takes {list(signature.parameters)}"
                )

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind(*args, **kwargs).arguments
            error = None
            try:
                self.build(given.get(self.tokens), None if self.lengths is None else given.get(self.lengths))
            except ValueError as failure:
                error = failure
            self._alone = not torch.is_grad_enabled()
            self._raise(error)

        model.register_forward_pre_hook(before, with_kwargs=True)

    def build(self, tokens: Tensor | None, lengths: Tensor | None) -> None:
        """From ids (B, L) int64 and lengths (B,) int64 or a mask (B, L). Raises ValueError for others, on this rank alone."""
        check_tensor(self.tokens, tokens)
        assert tokens is not None
        check_grid(self.tokens, tokens, tokens.device)
        batch, width = tokens.shape
        if lengths is None:
            lengths = torch.full((batch,), width, dtype=torch.int64, device=tokens.device)
        check_tensor(str(self.lengths), lengths)
        if lengths.dim() == 2:
            if lengths.shape != tokens.shape:
                raise ValueError(
                    f"{self.lengths} has shape {tuple(lengths.shape)}; pass a mask of shape {tuple(tokens.shape)}, or lengths ({batch},)"
                )
            mask = lengths.bool()
            lengths = mask.sum(1)
            if not torch.equal(mask, torch.arange(width, device=mask.device) < lengths[:, None]):
                raise ValueError(f"{self.lengths} has valid slots behind padding; pad on the right")
        check_length_grid(str(self.lengths), lengths, batch, tokens.device)
        space = UniqueSpace.from_padded(tokens, lengths)
        assert space.slots is not None
        self.space = space.with_spare_rows(self.row_multiple)
        self.first_slots = space.slots[space.segments.order[space.segments.offsets[:-1]]]

    def rows_of(self, grid: Tensor) -> Tensor:
        """The hidden states of the distinct tokens: grid (B, L, ...) -> (U, ...), read at first occurrences."""
        assert self.space is not None and self.first_slots is not None
        return self.space.fill_spare_rows(grid.reshape(-1, *grid.shape[2:]).index_select(0, self.first_slots))

    def fits(self, grid: Tensor) -> bool:
        """Whether grid (B, L, ...) is shaped like the tokens of the batch."""
        space = self.space
        return space is not None and tuple(grid.shape[:2]) == (space.num_samples, space.padded_length)

    def knows(self, mask: Tensor | None) -> bool:
        """Whether a mask that a module is given says what `lengths` says; without them it hides slots that the plan takes for valid."""
        return mask is None or self.lengths is not None

    def check_once(self, module: nn.Module, name: str, *grids: Tensor) -> None:
        """On a module's first call: every occurrence in grids (B, L, ...) equals its token's first one. Collective that time.

        Not collective where a rank evaluates alone, and no first call for those who train together.
        """
        if self._verified is None or self._verified & {(id(module), False), (id(module), self._alone)}:
            return
        assert self.space is not None
        error = None
        for grid in grids:
            there = self.space.expand(self.rows_of(grid))
            valid = self.space.expand(grid.new_ones(self.space.num_rows)).bool()
            if not torch.allclose(there[valid], grid[valid], rtol=1e-3, atol=1e-5):
                error = ValueError(
                    f"equal tokens have different hidden states in {name}: positions, dropout or causal layers below make it "
                    "inexact; take it out of tokenized_attention.modules"
                )
        if error is None or not self._alone:  # alone, what is wrong raises every time
            self._verified.add((id(module), self._alone))
        self._raise(error)

    def _raise(self, error: ValueError | None) -> None:
        """Raise what is wrong on any rank, on all of them; alone, what is wrong here."""
        if not self._alone:
            exchange_header(self.group, [], error)
        elif error is not None:
            raise error
