"""`modularbase base import`: a checkpoint of transformers becomes a base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from modularbase.cli.console import Json, err, print_json
from modularbase.cli.progress import install_bar


def import_base(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    name: Annotated[str | None, typer.Option(help="The base's id; else the folder's name.")] = None,
    version: Annotated[str, typer.Option(help="The base's version.")] = "1.0.0",
    float_type: Annotated[
        Literal["auto", "bf16", "f16"],
        typer.Option("--type", help="Of the matrices; auto: bf16 where the checkpoint has it."),
    ] = "auto",
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write a GGUF file there; install nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turns a Llama, Qwen2 or Qwen3 checkpoint into a 16-bit base, and installs NAME@VERSION."""
    # gguf takes a while to import, and no other command of this group needs it.
    from modularbase.bases import import_checkpoint
    from modularbase.bases.import_checkpoint import ImportOptions

    options = ImportOptions(name=name, version=version, float_type=float_type)
    with install_bar(folder.name) as show:
        if out_file is not None:
            import_checkpoint.write_base(folder, out_file, options, show)
        else:
            installed = import_checkpoint.import_base(folder, options, show)
    if out_file is not None:
        facts: dict[str, object] = {"path": out_file}
        err.print(f"written: {out_file}", soft_wrap=True)
    else:
        facts = asdict(installed)
        err.print(f"{installed.name} is installed: {installed.path}", soft_wrap=True)
    if as_json:
        print_json(facts)
