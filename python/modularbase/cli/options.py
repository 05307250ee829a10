"""Command-line options that several commands take, and what they become."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from modularbase.engine import Engine
from modularbase.errors import InvalidRequestError
from modularbase.types import PackRequest, PackUse, Result

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
Pack = Annotated[
    list[str] | None,
    typer.Option(
        "--pack",
        "-k",
        help="Pack to answer with: ID, ID@VERSION or ID@SPECIFIERS, with a weight as 0.5*ID; "
        "may be repeated.",
    ),
]
PackBudget = Annotated[str | None, typer.Option(help="Memory for packs, such as 256MB.")]
Policy = Annotated[
    Literal["blend", "best", "priority", "ties"], typer.Option(help="How several packs are joined.")
]
Fallback = Annotated[
    Literal["on_failure", "always", "never"],
    typer.Option(help="When other packs or the base may answer instead."),
]
Draft = Annotated[int, typer.Option("--draft", help="Tokens drafted per step by prompt lookup.")]


def load(
    base: str,
    dtype: Literal["auto", "keep", "f16", "bf16", "f32"] = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    pack_budget: str | None = None,
) -> Engine:
    """Loads the engine a command runs on."""
    return Engine.load(
        base,
        dtype=dtype,
        n_threads=threads,
        n_ctx=n_ctx,
        device=device,
        pack_budget=pack_budget,
    )


def pack_request(
    packs: list[str] | None,
    policy: Literal["blend", "best", "priority", "ties"] = "blend",
    fallback: Literal["on_failure", "always", "never"] = "on_failure",
) -> PackRequest:
    """What --pack, --policy and --fallback ask for.

    Raises:
        InvalidRequestError: A weight that is no number.
    """
    uses = tuple(_pack_use(text) for text in packs or ())
    return PackRequest(packs=uses, policy=policy, fallback=fallback)


def _pack_use(text: str) -> PackUse:
    weight, star, pack = text.rpartition("*")
    if not star:
        return PackUse(text)
    try:
        return PackUse(pack, float(weight))
    except ValueError as error:
        raise InvalidRequestError("--pack", "ID or WEIGHT*ID, such as 0.5*code", text) from error


def describe_packs(result: Result) -> str:
    """Which packs answered, and which did not; "" for the plain base."""
    used = ", ".join(f"{p.id} {p.version} x {p.weight:.2g}" for p in result.packs)
    failed = "; ".join(f"{', '.join(f.packs)}: {f.reason}" for f in result.fallbacks)
    parts = ([f"packs: {used}"] if used else []) + ([f"fell back: {failed}"] if failed else [])
    return "; ".join(parts)


def sampling(**given: Any) -> dict[str, Any]:
    """Sampling parameters as `Engine.submit` takes them, from the options of the same names."""
    given["stop"] = given.get("stop") or ()
    return given
