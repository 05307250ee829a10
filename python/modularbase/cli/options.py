"""Command-line options that several commands take, and what they become."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from modularbase.engine import Engine

DType = Annotated[
    Literal["auto", "keep", "f16", "bf16", "f32"],
    typer.Option(help="Type the base's matrices are held in."),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="Compute threads.")]
Context = Annotated[int | None, typer.Option("--n-ctx", "-c", help="Longest sequence, in tokens.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to make.")]
Temperature = Annotated[float, typer.Option("--temperature", "--temp", help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest that together reach p; 1: all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below p times the likeliest; 0: none.")]
RepeatPenalty = Annotated[float, typer.Option(help="Penalty on recent tokens; 1: none.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
Draft = Annotated[int, typer.Option("--draft", help="Tokens drafted per step by prompt lookup.")]


def load(
    base: str,
    dtype: Literal["auto", "keep", "f16", "bf16", "f32"] = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Engine:
    """Loads the engine a command runs on."""
    return Engine.load(base, dtype=dtype, n_threads=threads, n_ctx=n_ctx, device=device)


def sampling(**given: Any) -> dict[str, Any]:
    """Sampling parameters as `Engine.submit` takes them, from the options of the same names."""
    given["stop"] = given.get("stop") or ()
    return given
