"""The `modularbase` command."""

from __future__ import annotations

import sys

import typer

from modularbase.cli.base import base_app
from modularbase.cli.bench import bench
from modularbase.cli.chat import chat
from modularbase.cli.console import EXIT_INTERRUPTED, err, print_error
from modularbase.cli.context import context_app
from modularbase.cli.demo import demo_app
from modularbase.cli.generate import generate
from modularbase.cli.info import doctor, info
from modularbase.cli.pack import pack_app
from modularbase.cli.score import score
from modularbase.cli.train import train_app
from modularbase.errors import ModularBaseError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A small resident base model, and packs of domain knowledge that come and go.",
)
for command in (generate, chat, bench, score, info, doctor):
    app.command()(command)
app.add_typer(base_app, name="base")
app.add_typer(pack_app, name="pack")
app.add_typer(train_app, name="train")
app.add_typer(context_app, name="context")
app.add_typer(demo_app, name="demo")


def main() -> None:
    """Runs the command line; every known error ends in one line on stderr and an exit code."""
    try:
        app()
    except ModularBaseError as error:
        sys.exit(print_error(error))
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
