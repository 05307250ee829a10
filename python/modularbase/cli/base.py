"""`modularbase base`: which bases there are, and installing them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from modularbase.bases import install as bases
from modularbase.cli.base_import import import_base
from modularbase.cli.console import Json, err, out, print_facts, print_json
from modularbase.cli.progress import install_bar

base_app = typer.Typer(no_args_is_help=True, help="List, install, import and remove bases.")
base_app.command("import")(import_base)

Name = Annotated[str, typer.Argument(help="Name of the base, as `base list` shows it.")]


@base_app.command("list")
def list_bases(as_json: Json = False) -> None:
    """Lists the bases of the catalogue and those that were imported."""
    entries = bases.list_bases()
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    table = Table("name", "family", "licence", "MB", "installed", "source")
    for entry in entries:
        size = f"{entry.n_bytes / 1e6:.0f}" if entry.n_bytes else "?"
        installed = entry.damage or ("yes" if entry.path else "no")
        table.add_row(entry.name, entry.family, entry.licence, size, installed, entry.source)
    out.print(table)


@base_app.command()
def install(name: Name) -> None:
    """Downloads and verifies a base; one that is there stays as it is."""
    with install_bar(name) as show:
        installed = bases.install(name, show)
    err.print(f"{installed.name} is installed: {installed.path}", soft_wrap=True)


@base_app.command()
def info(name: Name, as_json: Json = False) -> None:
    """Prints where a base comes from and where it is."""
    entry = asdict(bases.info(name))
    if as_json:
        print_json(entry)
    else:
        print_facts(entry, name)


@base_app.command()
def remove(name: Name) -> None:
    """Deletes an installed base."""
    bases.remove(name)
    err.print(f"{name} is removed")
