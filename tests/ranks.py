"""A pool of ranks that outlives one test: importing torch costs seconds, running a function on the pool milliseconds.

Ranks are processes in a gloo group on the CPU or, with TA_TEST_DEVICES=cuda, in an NCCL group with a GPU each.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

TIMEOUT_S = 120  # a test that hangs fails within this time
AFTER_A_FAILURE_S = 10  # for the others to fail too
START_S = 180  # importing torch on a busy machine
ON_GPUS = os.environ.get("TA_TEST_DEVICES") == "cuda"
MANY_GROUPS = (
    400 if ON_GPUS else 40
)  # each keeps a gloo thread that wakes a hundred times a second; hosts never destroy theirs


def at_most(ranks: int) -> int:
    """`ranks`, or as many as there are GPUs when the ranks' tensors live there."""
    return min(ranks, _gpus()) if ON_GPUS else ranks


@contextlib.contextmanager
def own_groups() -> Iterator[None]:
    """Destroys, on every rank of the pool, the process groups that the block made, so that the pool outlives many such blocks.

    Not on GPUs: NCCL ends a communicator on all its ranks together, and one group holds several, in no order that ranks share.
    """
    import torch.distributed as dist

    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    yield
    dist.barrier()  # nobody waits in one of them any more
    if not ON_GPUS:
        for group in [group for group in groups if group not in before]:  # in the order in which every rank made them
            dist.destroy_process_group(group)
    gc.collect()  # models, full of cycles, hold them


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


class RankPool:
    """`size` processes in one group. `run(fn, *args)` calls fn(*args) on each and returns their results in rank order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[Any] = []
        self._store: Any = None  # where the ranks meet

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """fn must be importable (module level) and its arguments picklable. Raises the first rank's failure as an AssertionError."""
        if at_most(self.size) < self.size:
            import pytest

            pytest.skip(f"needs {self.size} GPUs")
        if not self._workers:
            self._start()
        outcomes = self._ask(fn, args, TIMEOUT_S)
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        if failures:
            self.close()  # the group may be out of step: the next test gets a fresh one
            raise AssertionError("\n".join(failures))
        if max(groups for _, (_, groups) in outcomes) > MANY_GROUPS:
            self.close()
        return [result for _, (result, _) in outcomes]

    def _ask(self, fn: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[tuple[bool, Any]]:
        """(whether it succeeded, then (result, process groups alive) or a traceback) of every rank; silence is failure."""
        for _, pipe in self._workers:
            with contextlib.suppress(OSError):  # of a rank that died, which shows below
                pipe.send((fn, args))
        begin = time.monotonic()
        pipes = [pipe for _, pipe in self._workers]
        outcomes: dict[Any, tuple[bool, Any]] = {}
        while len(outcomes) < len(pipes):
            waiting = [pipe for pipe in pipes if pipe not in outcomes]
            ready = wait(waiting, max(0.0, begin + seconds - time.monotonic()))
            for pipe in ready:
                try:
                    outcomes[pipe] = pipe.recv()
                except (EOFError, OSError):
                    outcomes[pipe] = (False, "died")
                if not outcomes[pipe][0]:  # the others may wait for it for ever
                    seconds = min(seconds, time.monotonic() - begin + AFTER_A_FAILURE_S)
            if not ready:
                outcomes.update((pipe, (False, f"did not answer within {seconds:.0f} s")) for pipe in waiting)
        return [outcomes[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers, self._store = [], None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        # a port that this process holds: one that was only found free may be taken when rank 0 opens it
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        context = get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        if not all(ok for ok, _ in self._ask(abs, (0,), START_S)):
            self.close()
            raise AssertionError(f"{self.size} ranks did not start within {START_S} s")


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    landing: Any = contextlib.nullcontext()
    if ON_GPUS:
        from on_device import OnDevice

        torch.cuda.set_device(rank)
        landing = OnDevice(torch.device("cuda", rank))
    dist.init_process_group(
        "nccl" if ON_GPUS else "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            with landing:
                result = fn(*args)
            outcome = (True, (_on_cpu(result), len(dist.distributed_c10d._world.pg_map)))
        except BaseException:
            outcome = (False, traceback.format_exc())
        pipe.send(outcome)


def _on_cpu(result: Any) -> Any:
    """A pipe would hand a GPU's memory to the other process, which must then outlive this one."""
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, torch.Tensor.cpu, result)
