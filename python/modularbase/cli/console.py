"""What the commands share: where output goes, and how an error ends the process.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or
request, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from modularbase.errors import InvalidRequestError, ModularBaseError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Base = Annotated[str, typer.Option("--base", "-b", help="Name of a base, or path of a GGUF file.")]
DEFAULT_BASE = "smollm2-135m"


def print_json(data: object) -> None:
    """Prints one JSON document to stdout."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2, default=_plain) + "\n")


def print_facts(facts: Mapping[str, object], title: str) -> None:
    """Prints name and value, one a line."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, str(value))
    out.print(table)


def print_error(error: ModularBaseError) -> int:
    """Says on stderr what went wrong; returns the exit code."""
    err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
    err.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return EXIT_USAGE if isinstance(error, InvalidRequestError) else EXIT_FAILED


def read_stdin() -> str:
    """All of stdin as text.

    Raises:
        InvalidRequestError: It is not UTF-8.
    """
    return decode_input(sys.stdin.buffer.read())


def decode_input(raw: bytes) -> str:
    """Bytes from stdin as text, whatever the locale says.

    Raises:
        InvalidRequestError: They are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError("stdin", "UTF-8 text", error.reason) from error


def _plain(value: Any) -> object:
    return value.tolist() if hasattr(value, "tolist") else str(value)
