"""`ta-plugin`: one command per file of this package."""

from __future__ import annotations

import typer

from ta_plugin.cli.analyze import analyze
from ta_plugin.cli.report import report

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Tools around exact attention over distinct tokens.")
app.command()(report)
app.command()(analyze)

if __name__ == "__main__":
    app()
