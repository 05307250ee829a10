"""`modularbase context`: how the context of a conversation is kept, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from modularbase.bases import install
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.byte_sizes import parse_bytes
from modularbase.cli.console import (
    DEFAULT_BASE,
    Base,
    Json,
    decode_input,
    err,
    out,
    print_json,
    read_stdin,
)
from modularbase.cli.context_page import context_page
from modularbase.cli.context_view import dialogue_view, totals_view
from modularbase.context.chat import Chat
from modularbase.context.costs import TierCosts
from modularbase.context.plan import ContextGrader
from modularbase.context_types import ContextOptions, ContextReport
from modularbase.errors import InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.storage.files import appearing

context_app = typer.Typer(
    no_args_is_help=True, help="See how the context of a conversation is kept."
)

Dialogue = Annotated[
    Path, typer.Argument(help="One JSON message a line, or a JSON list; - reads stdin.")
]
Budget = Annotated[
    str | None, typer.Option(help="Memory for keys and values, such as 16MB; none if left out.")
]
Window = Annotated[int, typer.Option(help="The last tokens, which are kept exactly.")]
Page = Annotated[Path | None, typer.Option(help="Write the coloured dialogue as a web page.")]


@context_app.command()
def explain(
    file: Dialogue,
    base: Base = DEFAULT_BASE,
    budget: Budget = None,
    window: Window = ContextOptions().window_tokens,
    html: Page = None,
    as_json: Json = False,
) -> None:
    """Shows which tier each part of a dialogue has, by what it says; the base is not run."""
    options = ContextOptions(
        budget_bytes=parse_bytes("--budget", budget) if budget else 0,
        window_tokens=window,
        demote_after_checks=1,  # there is no other check to wait for
    )
    report = _report(_messages(file), base, options)
    if html is not None:
        with appearing(html) as part:
            part.write_text(context_page(report, str(file)), encoding="utf-8")
        err.print(f"written to {html}", markup=False, soft_wrap=True)
    if as_json:
        print_json(_facts(report))
    elif html is None:
        out.print(dialogue_view(report))
    if not as_json:
        out.print(totals_view(report))


def _report(messages: list[Any], base: str, options: ContextOptions) -> ContextReport:
    path = install.resolve(base)
    metadata = read_metadata(path)
    chat = Chat(ChatTemplate.from_metadata(metadata), Tokenizer.from_metadata(metadata))
    chat.add_history(messages)
    costs = TierCosts.from_metadata(str(path), metadata)
    return ContextGrader().plan(chat, None, costs, options).report


def _facts(report: ContextReport) -> dict[str, object]:
    totals = {"total_tokens": report.total_tokens, "total_bytes": report.total_bytes}
    return totals | asdict(report)


def _messages(file: Path) -> list[Any]:
    text = read_stdin() if str(file) == "-" else _read(file)
    if text.lstrip().startswith("["):
        found = _parsed(text, str(file))
        return found if isinstance(found, list) else [found]
    lines = enumerate(text.splitlines(), start=1)
    return [_parsed(line, f"{file}, line {n}") for n, line in lines if line.strip()]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("file", "a JSON message", f"{place}: {error}") from error


def _read(file: Path) -> str:
    try:
        return decode_input(file.read_bytes())
    except OSError as error:
        raise InvalidRequestError("file", "a readable file", f"{file}: {error.strerror}") from error
