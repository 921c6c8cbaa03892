"""The `--ta-*` command line arguments, for Megatron's extra_args_provider or any argparse parser."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any


def add_ta_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the group "tokenized attention" and return the parser."""
    group = parser.add_argument_group("tokenized attention")
    group.add_argument(
        "--ta-ssp-size",
        type=int,
        default=1,
        help="ranks over which the token table is sharded; divides data x context parallel size, and equals the expert "
        "parallel size where there are experts",
    )
    group.add_argument(
        "--ta-tokenized-layers",
        type=int,
        default=None,
        help="how many layers, from the first, run on distinct rows; the others are stock layers over positions (default: all)",
    )
    group.add_argument(
        "--ta-objective",
        choices=("next", "masked"),
        default="next",
        help="of pretrain_gpt.py: the next token (stock causal layers above a sharded table), or masked tokens (tokenized layers below "
        "bidirectional stock ones)",
    )
    group.add_argument(
        "--ta-token-keyed-every",
        type=int,
        default=None,
        help="of pretrain_gpt.py: every so-many-th layer of a causal stack has keys and values of tokens alone and sees all positions "
        "before (default: none); an architecture choice, which rotary checkpoints do not load into",
    )
    group.add_argument(
        "--ta-window",
        type=int,
        default=None,
        help="beside token-keyed layers: how many positions the other layers see, their own among them (default: all)",
    )
    group.add_argument(
        "--ta-row-multiple", type=int, default=1, help="pad each rank's distinct rows to this multiple (default: 1)"
    )
    group.add_argument(
        "--ta-row-capacity",
        type=int,
        nargs="+",
        default=None,
        help="pad every microbatch to this many rows, or to the smallest of several that holds them: few shapes for CUDA graphs and the "
        "allocator, one for interleaved pipelines",
    )
    group.add_argument(
        "--ta-vocab-divisible-by",
        type=int,
        default=128,
        help="the table has a multiple of this many rows; every SSP size a checkpoint shall load under must divide it",
    )
    group.add_argument(
        "--ta-nondeterministic",
        action="store_true",
        help="backward of tokenized layers may add in any order, which is faster on Hopper GPUs; --deterministic-mode overrides it",
    )
    return parser


def model_options(args: Namespace) -> dict[str, Any]:
    """The keyword arguments of TokenizedModel that the command line decides."""
    capacity = args.ta_row_capacity
    return {
        "row_multiple": args.ta_row_multiple,
        "row_capacity": capacity[0] if capacity is not None and len(capacity) == 1 else capacity,
        "vocab_divisible_by": args.ta_vocab_divisible_by,
        "deterministic": not args.ta_nondeterministic,
    }
