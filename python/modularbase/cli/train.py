"""`modularbase train`: packs that learn; needs the extra `modularbase[train]`."""

from __future__ import annotations

import typer

from modularbase.cli.train_align import align
from modularbase.cli.train_distill import distill
from modularbase.cli.train_fit import fit
from modularbase.cli.train_fusion import fusion
from modularbase.cli.train_gate import gate
from modularbase.cli.train_router import router

train_app = typer.Typer(no_args_is_help=True)


@train_app.callback()
def train() -> None:
    """Train packs in PyTorch."""


for command in (fit, align, gate, distill, router, fusion):
    train_app.command()(command)
