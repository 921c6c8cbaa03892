"""Pretrain a language model whose token table and, for masked tokens, lower layers are tokenized.

With megatron.training (in the wheel of megatron-core 0.19; of 0.16 in a checkout of Megatron-LM that MEGATRON_LM_PATH names) through
its pretrain(), with the arguments of Megatron-LM's pretrain_gpt.py and ours:

    torchrun --nproc_per_node 8 examples/megatron/pretrain_gpt.py --ta-ssp-size 8 ARGUMENTS

Without, or with --core, on megatron.core alone, over the bytes of files (core_loop.py):

    torchrun --nproc_per_node 2 examples/megatron/pretrain_gpt.py --core --ta-ssp-size 2 [--text FILE ...]

--ta-objective next (the default) is a causal GPT with rotary positions: stock layers above a table that is sharded over SSP and looked up
once per distinct id. A tokenized layer below would be bidirectional and show each position what it shall predict, so it is refused.
With --ta-token-keyed-every n, every n-th layer is token-keyed instead: its keys and values come from a table of tokens, its queries from
positions, so it is causal, sees all positions before and holds each distinct token once. The other layers are stock, rotary, and with
--ta-window W see W positions. This is an architecture choice: such a model is trained as one, no rotary checkpoint loads into it and it is
no drop-in for a rotary model. Its tables are sharded over TP, and a sequence over context
parallelism, where rotary layers gather the keys of all positions and token-keyed ones those of distinct tokens; SSP and pipeline
parallelism are refused beside it.
--ta-objective masked hides 15% of the tokens and predicts them: the first --ta-tokenized-layers layers (half of them by default) run on
distinct tokens without positions, and stock bidirectional layers with rotary positions above put them in order.

Dropout is refused beside tokenized layers (pass --hidden-dropout 0 --attention-dropout 0), and context parallelism. SSP takes the place of
expert parallelism among Megatron's groups; with experts both sizes agree. Megatron's FLOP counts assume attention over positions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

if os.environ.get("MEGATRON_LM_PATH"):
    sys.path.insert(0, os.environ["MEGATRON_LM_PATH"])

BYTES = 256


def text_batches(args: argparse.Namespace, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of this data-parallel rank, cut at random from the bytes of all files."""
    from stack import masked_batch, vocabulary

    text = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in args.text)), dtype=torch.uint8)
    if len(text) <= args.seq_length:
        raise SystemExit(f"--text holds {len(text)} bytes; it must hold more than --seq-length {args.seq_length}")
    generator = torch.Generator().manual_seed(args.seed + rank)
    lengths = torch.full((args.micro_batch_size,), args.seq_length)
    while True:
        starts = torch.randint(0, len(text) - args.seq_length, (args.micro_batch_size, 1), generator=generator)
        cut = text[starts + torch.arange(args.seq_length + 1)].long()
        if args.ta_objective == "masked":
            tokens, labels = masked_batch(cut[:, :-1], args.seed, vocabulary(args, BYTES) - 1)
        else:
            tokens, labels = cut[:, :-1], cut[:, 1:]
        yield tokens.contiguous(), lengths, labels.contiguous()


def on_core() -> None:
    from core_loop import config_of, core_parser, set_up, train
    from stack import build_model

    parser = core_parser(__doc__, seq_length=256, micro_batch_size=4)
    sources = sorted((Path(__file__).parents[2] / "ta_plugin").rglob("*.py"))
    parser.add_argument("--core", action="store_true", help="megatron.core alone, although megatron.training is there")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=sources, help="files to read (default: ta_plugin's own sources)"
    )
    args = parser.parse_args()
    groups, device = set_up(args)
    model = build_model(args, lambda **changes: config_of(args, **changes), groups, BYTES, rotary_base=10000.0)
    train(args, model.to(device), groups, text_batches(args, groups.dp.rank()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if "--core" in sys.argv or find_spec("megatron.training") is None:
        on_core()
    else:
        import megatron_training

        megatron_training.main()
