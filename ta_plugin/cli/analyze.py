"""`ta-plugin analyze`: how often tokens repeat in your data, and what attention over distinct tokens would save there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ta_plugin.data.interactions import load_interactions
from ta_plugin.data.repeats import Repeats, histories, read_ids, windows

LENGTHS = tuple(4**n for n in range(3, 11))  # 64 to 1,048,576
TOKENS = 1 << 23  # read per length at most
NAMES = {  # of load_interactions' arguments, for its messages
    "user": "--user-column",
    "item": "--item-column",
    "time": "--time-column",
    "tokens": "--columns",
    "item_path": "--item",
}


def analyze(
    file: Annotated[Path, typer.Argument(help="ids: .npy (n,) or (samples, length), raw .bin, or RecBole's .inter")],
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens of a sample; several times for several")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="samples looked at per length, as many as a batch has")] = 64,
    dtype: Annotated[str, typer.Option(help="of a .bin file")] = "uint16",
    columns: Annotated[
        str, typer.Option(help="of an .inter file: what makes a token, separated by commas")
    ] = "item_id",
    item: Annotated[Path | None, typer.Option(help="RecBole's .item file, for columns that live there")] = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str = "timestamp",
) -> None:
    """How often tokens repeat in samples of your data (L/U), and what that saves in attention and in traffic."""
    try:
        if file.suffix == ".inter":
            tokens = tuple(columns.split(","))
            data = load_interactions(
                file,
                item,
                user=user_column,
                item=item_column,
                time=time_column,
                tokens=tokens,
                action=None,
                names=NAMES,
            )
            users = histories(data, samples)
            longest = max(len(user) for user in users)
            tried = length or [each for each in LENGTHS if each < longest] + [longest]
            found = [Repeats.of(users, each) for each in tried]
        else:
            ids = read_ids(file, dtype)
            most = ids.shape[-1]
            tried = length or [each for each in LENGTHS if each <= most] or [most]
            tried = [most] if ids.ndim == 2 and not length else tried
            if max(tried) > most:
                raise ValueError(
                    f"--length is {max(tried)}, but {file} holds {most} tokens in a row; pass at most that"
                )
            found = [Repeats.of(windows(ids, each, max(1, min(samples, TOKENS // each))), each) for each in tried]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(found, file.name)


def show(found: list[Repeats], name: str) -> None:
    """One table, and how to read it."""
    table = Table(title=f"tokens of {name}", title_justify="left")
    for column in ("length", "samples", "L/U", "distinct tokens", "self-attention", "target attention", "look-ups"):
        table.add_column(column, justify="right")
    for r in found:
        table.add_row(
            f"{r.length:,}",
            str(r.samples),
            f"{r.occurrences / r.rows:.2f}",
            f"{r.rows / r.samples:,.0f}",
            f"{r.position_pairs / r.pairs:.3g}x",
            f"{r.occurrences / r.rows:.3g}x",
            f"{r.occurrences / r.ids:.3g}x",
        )
    console = Console(width=None if Console().is_terminal else 118)
    console.print(table)
    console.print(
        "How many times fewer: query-key pairs of bidirectional self-attention and of target attention, and rows looked up for all samples "
        "together. L/U: occurrences over distinct tokens of a sample, which has at most the length's tokens. Time falls by less: short "
        "samples, and L/U near 1, gain nothing "
        "(examples/benchmarks/README.md)."
    )
