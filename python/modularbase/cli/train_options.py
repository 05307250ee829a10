"""Options that the training commands share, and what they become."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modularbase.errors import InvalidRequestError

if TYPE_CHECKING:
    from modularbase.training.options import PartRates

_Paths = list[Path] | None

Data = Annotated[
    _Paths, typer.Option(help="Text of the domain: files or folders; may be repeated.")
]
HeldOut = Annotated[_Paths, typer.Option(help="Text to measure on; else drawn from data.")]
Neutral = Annotated[_Paths, typer.Option(help="Other text, on which the pack is held to the base.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the optimiser.")]
BatchBlocks = Annotated[int | None, typer.Option(help="Sequences of a step.")]
BlockTokens = Annotated[int | None, typer.Option(help="Tokens of a sequence.")]
NeutralShare = Annotated[float | None, typer.Option(help="Share of neutral sequences.")]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", "--lr")]
PartRate = Annotated[
    list[str] | None,
    typer.Option(
        "--rate",
        metavar="PART=FACTOR",
        help="Rate of a part, as a multiple of --lr; 0 freezes it. Parts: w_in, norm, router, "
        "experts, w_out, token_gate; may be repeated.",
    ),
]
WarmupSteps = Annotated[int | None, typer.Option(help="Steps in which the rate rises.")]
QatSteps = Annotated[
    int | None, typer.Option(help="Last steps, with weights rounded as the pack will hold them.")
]
Accumulation = Annotated[int | None, typer.Option(help="Forwards a step is cut into.")]
Precision = Annotated[
    Literal["auto", "f32", "bf16"] | None, typer.Option(help="Type of the products.")
]
HeldOutBlocks = Annotated[
    int | None, typer.Option(help="Most sequences to measure on, of each kind of text.")
]
EvalEvery = Annotated[int | None, typer.Option(help="Steps between measurements.")]
Patience = Annotated[
    int | None, typer.Option(help="Measurements without a better one that end the run; 0: off.")
]
SaveEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
Seed = Annotated[int | None, typer.Option(help="Of the weights and the order.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1)]
FromEngine = Annotated[
    bool,
    typer.Option(
        "--from-engine",
        help="Let an engine in another process run the base's lower half, once a block.",
    ),
]
StateCache = Annotated[
    str | None, typer.Option(help="Most that its results may take on the disk, as 16GB.")
]
DataLicence = Annotated[str, typer.Option(help="Licence of the text, for the manifest.")]

Project = Annotated[Path, typer.Argument(help="Project folder, as `pack init` makes it.")]
ProjectBase = Annotated[str | None, typer.Option("--base", "-b", help="Instead of the project's.")]

PackSource = Annotated[
    str,
    typer.Argument(
        metavar="PROJECT_OR_PACK",
        help="Folder of a project that is built, an archive or pack file, or an installed pack.",
    ),
]
NewFolder = Annotated[
    Path | None,
    typer.Option("--folder", help="Project of the new version; by default ID-VERSION."),
]
NewVersion = Annotated[
    str | None, typer.Option("--version", help="Of the new pack; by default the next minor one.")
]


def part_rates(told: list[str] | None) -> PartRates | None:
    """What --rate says, or None where nothing was said.

    Raises:
        InvalidRequestError: No such part, or no number.
    """
    from modularbase.training.options import PartRates

    parts = [field.name for field in fields(PartRates)]
    rates: dict[str, float] = {}
    for text in told or ():
        part, _, factor = text.partition("=")
        try:
            if part not in parts:
                raise ValueError(part)
            rates[part] = float(factor)
        except ValueError as error:
            expected = f"PART=FACTOR with a part of {', '.join(parts)}"
            raise InvalidRequestError("--rate", expected, text) from error
    return PartRates(**rates) if rates else None


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, by their names, with lists of paths as tuples."""
    told = {name: value for name, value in options.items() if value not in (None, [])}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
