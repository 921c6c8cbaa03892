"""The log weights of everything before each chunk, a group of chunks at a time, from a state carried over the groups.

Without decay the weight of row u before chunk c is log(count of u before c). With a decay per head it is the log-sum-exp of
decay * (t_j - r_c) over the occurrences j of u before c, r_c a time in the middle of chunk c: the bias -decay * (t_i - t_j) of a query at
time t_i less the part -decay * (t_i - r_c) that depends on the query only, and shifts its log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ta_plugin.attention.chunks import CausalChunks, Group
from ta_plugin.ops import segment_logsumexp, segment_sum


class PrefixCounts:
    """Counts before each chunk: carried as int64, exact for any length."""

    cell_tensors = 2  # chunks x rows tensors held at a time

    def __init__(self, chunks: CausalChunks, dtype: torch.dtype) -> None:
        self.chunks, self.dtype = chunks, dtype
        self.before = torch.zeros_like(chunks.space.tokens)

    def weights(self, group: Group) -> Tensor:
        """Log weights (chunks, rows) of the next group; -inf for a row that has not occurred."""
        at, rows = self.chunks.index_of(group), group.num_rows
        # integers: exact in whatever order they are added, and allowed under torch.use_deterministic_algorithms
        seen = torch.zeros(group.size + 1, rows, dtype=torch.int32, device=at.chunk.device)
        cells = (at.chunk + 1) * rows + at.segments.index
        seen.view(-1).scatter_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))
        seen.cumsum_(0)
        before = self.before[group.rows].to(self.dtype)
        self.before[group.rows] += seen[-1]
        return torch.add(seen[:-1], before).log_()


@dataclass(frozen=True)
class Decay:
    """A decay per head (H,) and the time of each occurrence (M,)."""

    per_head: Tensor
    times: Tensor


class PrefixDecay:
    """Decayed sums before each chunk in log space, and where asked the mean of t_j - r_c under them, their derivative by the decay."""

    def __init__(self, chunks: CausalChunks, dtype: torch.dtype, decay: Decay, with_mean: bool = False) -> None:
        self.chunks, self.dtype, self.with_mean = chunks, dtype, with_mean
        self.decay, self.times = decay.per_head.detach(), decay.times
        self.cell_tensors = 7 if with_mean else 3
        shape = (decay.per_head.numel(), chunks.space.num_rows)
        # float64: shifted at every group, and read after any number of them
        self.log = torch.full(shape, -torch.inf, dtype=torch.float64, device=decay.times.device)
        self.mean = torch.zeros_like(self.log) if with_mean else None
        middle = (chunks.bounds[:-1] + chunks.bounds[1:]).div(2, rounding_mode="floor")
        reference = decay.times[middle]
        self.reference = torch.cat([reference, reference[-1:]])  # the state after the last chunk needs one too

    def ages(self, group: Group) -> Tensor:
        """t_j - r_c (queries,) of a group's occurrences, each against its own chunk."""
        chunk = self.chunks.index_of(group).chunk
        return (self.times[group.queries] - self.reference[group.first : group.last][chunk]).to(self.dtype)

    def bias(self, group: Group) -> Tensor:
        """decay * (t_j - r_c) (queries, H): the weight of an occurrence within its chunk, and minus the term of a query."""
        return self.ages(group).unsqueeze(1) * self.decay.to(self.dtype)

    def weights(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Log weights (chunks, rows, H) of the next group and, with_mean, their derivatives by the decay, shaped alike."""
        chunk, row, segments = self.chunks.pairs_of(group)
        rows, heads = group.num_rows, self.decay.numel()
        reference = self.reference[group.first : group.last + 1]
        step = (reference.diff()).to(self.dtype)
        bias = self.bias(group)
        by_pair = segment_logsumexp(bias, segments)

        log = torch.full((group.size + 1, heads, rows), -torch.inf, dtype=self.dtype, device=row.device)
        log[0] = self.log[:, group.rows].to(self.dtype)
        moved = by_pair - step[chunk].unsqueeze(1) * self.decay.to(self.dtype)
        log.permute(0, 2, 1).index_put_((chunk + 1, row), moved)
        mean = None
        if self.mean is not None:
            share = (bias - by_pair[segments.index]).exp()
            of_pair = segment_sum(share * self.ages(group).unsqueeze(1), segments)
            mean = torch.zeros_like(log)
            mean[0] = self.mean[:, group.rows].to(self.dtype)
            mean.permute(0, 2, 1).index_put_((chunk + 1, row), of_pair - step[chunk].unsqueeze(1))
        log, mean = _scan(log, mean, (reference - reference[0]).to(self.dtype), self.decay.to(self.dtype))
        self.log[:, group.rows] = log[-1].double()
        if self.mean is not None and mean is not None:
            self.mean[:, group.rows] = mean[-1].double()
        return log[:-1].transpose(1, 2), None if mean is None else mean[:-1].transpose(1, 2)


def _scan(log: Tensor, mean: Tensor | None, reference: Tensor, decay: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sums over all chunks up to each, log (n, H, K) relative to reference (n,), by doubling: every term stays near its own time."""
    reach = 1
    while reach < log.shape[0]:
        elapsed = (reference[reach:] - reference[:-reach])[:, None, None]
        older, newer = log[:-reach] - elapsed * decay[None, :, None], log[reach:]
        total = torch.logaddexp(older, newer)
        if mean is not None:
            share = (older - total).exp().nan_to_num_(0.0)  # both absent: -inf - -inf
            mixed = torch.lerp(mean[reach:], mean[:-reach] - elapsed, share)
            mean = torch.cat([mean[:reach], mixed])
        log = torch.cat([log[:reach], total])
        reach *= 2
    return log, mean
