"""Every operator once on small shapes: what compute-sanitizer watches (tests/gpu.sh). Not a test: it checks sizes only."""

from __future__ import annotations

import sys

import torch

from ta_plugin.ops import (
    Segments,
    expand,
    load_op,
    merge_into,
    merge_partials,
    operators,
    segment_logsumexp,
    segment_sum,
)


def plans(device: str) -> None:
    op = torch.ops.ta_plugin
    for samples, length in ((3, 70), (2, 1500), (2, 5000), (1, 16384), (2, 17000)):
        tokens = (torch.arange(samples * length) * 2654435761 % 997).view(samples, length)
        tokens[:, ::3] = 7  # a hot token
        lengths = torch.tensor([length, *[length // 2] * (samples - 1)], device=device)
        for rows in (-1, samples * length):
            for grouped in (True, False):
                found = op.unique(tokens.to(device), lengths, rows, grouped)
                assert int(found[-1][0]) == int(lengths.sum())
        bounds = torch.arange(samples + 1, device=device) * length
        flat = op.unique(tokens.view(-1).to(device), bounds, -1)
        assert int(flat[-1][0]) == samples * length
        later = op.unique(tokens.view(-1).to(device), bounds, -1, False)
        order, offsets = op.group(later[4], later[2][: int(later[-1][1])])
        assert torch.equal(order, flat[5]) and offsets[-1] == samples * length
        owner = op.owners(flat[0][: int(flat[-1][1])], 3, 1009, 7)
        order, sizes = op.partition(owner, torch.tensor([0, owner.numel()], device=device), 3)
        assert int(sizes.sum()) == order.numel()
    distinct = torch.arange(2000, device=device).view(1, 2000)
    assert int(op.unique(distinct, torch.tensor([2000], device=device), 2000)[-1][1]) == 2000
    one_fingerprint = torch.arange(7000, device=device) * (
        (1 << 32) + 0x9E3779B1
    )  # more than a part holds in shared memory
    assert int(op.unique(one_fingerprint, torch.tensor([0, 7000], device=device), 7)[-1][1]) == 7000
    assert op.owners(distinct.view(-1), 5, 0, 0).max() < 5
    assert int(op.local_rows(distinct.view(-1), 500, 700, 2000, 7, -1).max()) == 699
    nobody = torch.full((900,), -1, device=device)
    assert (op.partition(nobody, torch.tensor([0, 900], device=device), 3)[1] < 0).all()


def buckets(device: str) -> None:
    op = torch.ops.ta_plugin
    for ranks, n, samples, bound in (
        (1, 1, 1, 1),
        (2, 5000, 3, 3000),
        (2, 5000, 300, 100),
        (7, 9001, 0, 5),
        (1000, 4099, 2, 9),
    ):
        owner, ends = (
            torch.arange(n, device=device) % ranks,
            torch.arange(samples + 1, device=device) * max(n - 3, 1) // max(samples, 1),
        )
        wide = torch.zeros(ranks, bound + 2, dtype=torch.int32, device=device)
        taken = [wide[:, 1:-1], owner.new_zeros(ranks, bound), wide.float()[:, 2:]]
        sizes, most = owner.new_zeros(ranks, samples + 2)[:, 2:], owner.new_zeros(1)
        op.bucket(owner, ends.int(), [owner, owner, owner.float()], taken, sizes, most)
        received = op.bounds(sizes)
        assert int(received[-1]) == (int(ends[-1]) if int(most) <= bound else 0)
        for x, widen in zip(taken, (True, False, False), strict=True):
            together = op.compact(x, received, widen)
            assert op.spread(together, received, ranks).shape == (ranks, bound)


def rows(device: str) -> None:
    for sizes in ([0, 3, 1, 0, 33, 1000, 0], [1] * 90, [0] * 50 + [2], [700, 0, 300], [3000, 0, 7]):
        index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        index = index[torch.randperm(index.numel())]
        segments = Segments(*(x.to(device) for x in Segments.from_index(index, len(sizes)).tensors()))
        none = torch.zeros(600, dtype=torch.int64, device=device)
        spare = Segments(torch.cat([segments.index, none]), torch.cat([segments.order, none - 1]), segments.offsets)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for width in (1, 3, 4, 128, 300):
                values = torch.ones(index.numel() + 600, width).to(device, dtype)
                assert (segment_sum(values, spare) == segment_sum(values[:-600], segments)).all()
                assert segment_logsumexp(values, spare).shape[0] == len(sizes)
                values = values[:-600].clone().requires_grad_()
                (segment_sum(values, segments) + segment_logsumexp(values, segments).nan_to_num()).sum().backward()
                assert expand(segment_sum(values, segments), segments).shape == values.shape
    for dim in (7, 20, 64, 128):
        outs = torch.ones(3, 5, 2, dim).to(device).requires_grad_()
        lses = torch.zeros(3, 5, 2).to(device).requires_grad_()
        out, lse = merge_partials(outs, lses, torch.bfloat16)
        (out.float().sum() + lse.sum()).backward()
        merge_into(out.detach(), lse.detach(), out.detach().clone(), lse.detach().clone())


if __name__ == "__main__":
    for name in operators():
        assert load_op(name, device="cuda").implementation == "compiled"
    plans("cuda")
    buckets("cuda")
    rows("cuda")
    torch.cuda.synchronize()
    print("every operator ran", file=sys.stderr)
