"""`modularbase score`: how likely the base finds a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modularbase.cli import options as o
from modularbase.cli.console import DEFAULT_BASE, Base, Json, out, print_json, read_stdin
from modularbase.errors import InvalidRequestError


def score(
    file: Annotated[Path, typer.Argument(help="Text file; - reads stdin.")],
    base: Base = DEFAULT_BASE,
    dtype: o.DType = "auto",
    threads: o.Threads = None,
    n_ctx: o.Context = None,
    device: o.Device = "auto",
    pack: o.Pack = None,
    pack_budget: o.PackBudget = None,
    policy: o.Policy = "blend",
    as_json: Json = False,
) -> None:
    """Prints the perplexity of a text; with --json, each token's log-probability."""
    text = read_stdin() if str(file) == "-" else _read(file)
    packs = o.pack_request(pack, policy, "never")
    with o.load(base, dtype, threads, n_ctx, device, pack_budget) as engine:
        result = engine.score(text, packs=packs)
    if as_json:
        print_json(
            {
                "perplexity": result.perplexity,
                "token_ids": result.token_ids,
                "logprobs": result.logprobs,
            }
        )
    else:
        out.print(f"perplexity {result.perplexity:.4f} over {len(result.logprobs)} tokens")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError("file", "a readable file", f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError("file", "UTF-8 text", f"{file}: {error.reason}") from error
