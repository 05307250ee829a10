"""`modularbase train`: packs that learn; needs the extra `modularbase[train]`."""

from __future__ import annotations

import typer

from modularbase.cli.train_align import align
from modularbase.cli.train_fit import fit
from modularbase.cli.train_gate import gate

train_app = typer.Typer(no_args_is_help=True)


@train_app.callback()
def train() -> None:
    """Train packs in PyTorch."""


for command in (fit, align, gate):
    train_app.command()(command)
