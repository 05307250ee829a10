"""Aligns a pack with a new base: ``python -m benchmarks.align [--device cuda] [--base-rate 1e-3]``.

Needs the texts of ``python -m packs.texts medical neutral``. Prints a table, and writes it to
benchmarks/results/align.md and .json.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.align.experiment import Outcome, run
from benchmarks.align.settings import AlignSettings
from benchmarks.ours import installed_base
from benchmarks.paths import RESULTS, ROOT
from benchmarks.report import Table, markdown, write_json, write_text
from modularbase.errors import ModularBaseError

_KINDS: dict[type, Callable[[str], object]] = {
    int: int,
    float: float,
    str: str,
    tuple: lambda text: tuple(map(float, text.split(","))),
    type(Path()): Path,
}

TARGET_RECOVERY = 0.8
TARGET_TOKENS = 0.1


def tables(outcome: Outcome) -> list[Table]:
    """The cases, and what alignment recovers."""
    rows = [
        [
            row.name,
            f"{row.n_tokens:,}" if row.n_tokens else "",
            f"{math.exp(row.loss):.3f}",
            f"{row.loss:.4f}",
            f"{math.exp(row.neutral_loss):.2f}",
        ]
        for row in outcome.rows()
    ]
    header = ["", "training tokens", "perplexity, domain", "loss, nats a token", "neutral text"]
    share = outcome.aligned.n_tokens / outcome.made_for.n_tokens
    summary = [
        [name, f"{outcome.recovery(reference):.1%}", f">= {TARGET_RECOVERY:.0%}"]
        for name, reference in (
            ("of the loss above the pack on its own base", outcome.made_for),
            ("of the loss above a pack trained anew", outcome.anew),
        )
    ]
    summary.append(["tokens, of stage 1's", f"{share:.1%}", f"<= {TARGET_TOKENS:.0%}"])
    return [
        Table("A pack on a new version of its base", header, rows),
        Table("What alignment recovers", ["", "found", "target"], summary),
    ]


def settings_of(arguments: Sequence[str] | None) -> tuple[AlignSettings, Path]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.align", description=__doc__)
    parser.add_argument("--base", type=Path, help="GGUF file of base 1.0, default smollm2-135m")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    for field in fields(AlignSettings):
        if field.name != "base":
            name = field.name.replace("_", "-")
            parser.add_argument(
                f"--{name}", type=_KINDS[type(field.default)], default=field.default
            )
    chosen = vars(parser.parse_args(arguments))
    output = chosen.pop("output")
    chosen["base"] = chosen["base"] or installed_base()
    return AlignSettings(**chosen), output


def told(settings: AlignSettings) -> dict[str, str]:
    """The settings as the results tell them: of this machine, no folder."""
    values = asdict(settings)
    for name, value in values.items():
        if isinstance(value, Path):
            is_inside = value.is_relative_to(ROOT)
            values[name] = value.relative_to(ROOT) if is_inside else value.name
    return {name: str(value) for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment from the start."""
    settings, output = settings_of(arguments)
    shutil.rmtree(settings.work, ignore_errors=True)
    try:
        outcome = run(settings, lambda text: print(text, file=sys.stderr, flush=True))
    except ModularBaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = "\n\n".join(map(markdown, tables(outcome))) + "\n"
    found = {
        "cases": [asdict(row) for row in outcome.rows()],
        "recovery": outcome.recovery(outcome.made_for),
        "recovery_of_training_anew": outcome.recovery(outcome.anew),
    }
    write_json(output / "align.json", {"settings": told(settings), **found})
    write_text(output / "align.md", shown)
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
