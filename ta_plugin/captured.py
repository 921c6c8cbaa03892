"""A training step in a CUDA graph: captured once, replayed with the inputs of each batch, without the host's share of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ta_plugin.beside import Beside
from ta_plugin.bounds import Bounds
from ta_plugin.embedding import ShardedTokenEmbedding
from ta_plugin.parallel import SSPGroup, exchange_header


class CapturedStep:
    """Calls `step` by replaying it; on the CPU by calling it.

    step:    takes tensors and returns a tensor or a tuple of them; forward, loss and backward, optionally an optimizer that can be
             captured. Nothing in it may read the device: `TokenizedAttention` does not with `row_bound`
    modules: whose gradients the step leaves: parameters, and the rows of every `ShardedTokenEmbedding` among them
    inputs:  an example batch; every call's inputs have these shapes and dtypes

    Constructing runs the step `warm_up` times, and captures it. A call leaves gradients as the step itself would after `zero_grad()`:
    apply or forget them before the next one. What it returns is overwritten by the next call. Results do not wait for how many distinct
    ids an owner found: beyond `id_bound` the gradients of its rows are left out, and the next call's results are NaN on every rank.

    Over several ranks both are collective: every rank makes the same calls in one order, and its collectives are in the graph (NCCL). Dense
    gradients are averaged by `average_gradients` within the step or after it. Each replay counts the traffic that was captured.
    """

    def __init__(
        self, step: Callable[..., Any], modules: Iterable[nn.Module], inputs: Iterable[Tensor], *, warm_up: int = 3
    ) -> None:
        if warm_up < 1:
            raise ValueError(
                f"warm_up is {warm_up}; pass 1 or more: the first call of a step does what a graph cannot hold"
            )
        parts = [part for module in modules for part in module.modules()]
        self._step = step
        self._parameters = list(dict.fromkeys(p for part in parts for p in part.parameters(recurse=False)))
        self._tables = list(dict.fromkeys(part for part in parts if isinstance(part, ShardedTokenEmbedding)))
        self._inputs = [x.detach().clone() for x in inputs]
        groups = (getattr(part, "group", None) for part in parts)
        bounds = (getattr(part, "bounds", None) for part in parts)
        self._bounds = [x for x in bounds if isinstance(x, Bounds)]
        self._groups = list(dict.fromkeys(g for g in groups if isinstance(g, SSPGroup) and g.size > 1))
        self._graph: torch.cuda.CUDAGraph | None = None
        if torch.cuda.is_available() and all(x.is_cuda for x in self._inputs):
            self._capture(warm_up)

    def _capture(self, warm_up: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                with self._lasting_branches():
                    self._step(*self._inputs)
                self._forget()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        counted = [group.traffic.copy() for group in self._groups]
        error: Exception | None = None
        try:
            # thread_local: threads of torch.distributed may call CUDA meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"), self._lasting_branches():
                self._outputs = self._step(*self._inputs)
        except Exception as failure:
            error = failure
        self._sent = [g.traffic.since(before) for g, before in zip(self._groups, counted, strict=True)]
        self._count(-1)  # capturing sent nothing
        for group in self._groups:  # what fails on one rank fails on all: a replay would wait for it
            exchange_header(group, [], error)
        if error is not None:
            raise error
        self._gradients = [p.grad for p in self._parameters]
        self._rows = [table.take_recorded() for table in self._tables]
        self._forget()

    @contextmanager
    def _lasting_branches(self) -> Iterator[None]:
        """Inside, what a module's forward does beside the rest may go on beside backward; joined here where no backward came."""
        beside = Beside(torch.device("cuda"), lasts=True)
        for bounds in self._bounds:
            bounds.beside = beside
        try:
            yield
            beside.end()
        finally:
            for bounds in self._bounds:
                bounds.beside = None

    def _count(self, times: int) -> None:
        for group, sent in zip(self._groups, self._sent, strict=True):
            group.traffic.add(sent, times)

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        for table in self._tables:
            table.zero_grad()

    def __call__(self, *inputs: Tensor) -> Any:
        """What `step(*inputs)` returns."""
        given, wanted = ([(tuple(x.shape), x.dtype) for x in each] for each in (inputs, self._inputs))
        if given != wanted:
            raise ValueError(f"inputs are {given}; pass the shapes and dtypes that were captured, {wanted}")
        if any(table.holds_gradients for table in self._tables):
            raise RuntimeError(
                "a table still holds the gradients of the last call; run its step() or zero_grad() first"
            )
        if self._graph is None:
            self._forget()
            return self._step(*inputs)
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._graph.replay()
        self._count(1)
        for parameter, grad in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = grad
        for table, recorded in zip(self._tables, self._rows, strict=True):
            for rows, grad in recorded:
                table.record(rows, grad)
        return self._outputs
