"""Measures what compressing a context costs: ``python -m benchmarks.context [--part fidelity]``.

Prints tables, and writes them to benchmarks/results/context.md and .json with plots beside them.
Parts that are not run keep what an earlier run gave.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.context.parts import PARTS, Bench, PartResult
from benchmarks.context.settings import SMALL, Settings
from benchmarks.ours import installed_base
from benchmarks.paths import RESULTS
from benchmarks.report import Table, commit, markdown, write_json, write_text
from packs.obtaining import TextError

_SIZES = (
    *("documents", "prefix", "read", "sentences", "samples"),
    *("dialogues", "chats", "compared", "probes", "answer"),
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--base", type=Path, help="GGUF file, default smollm2-135m")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="for tests: the least of everything")
    told = ",".join(f"{ratio:g}" for ratio in Settings.ratios)
    parser.add_argument("--ratios", type=_ratios, help=f"of what can choose; default {told}")
    for name in _SIZES:
        default = getattr(Settings, f"n_{name}")
        parser.add_argument(f"--{name}", type=int, help=f"default {default}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts."""
    chosen = parse_arguments(arguments)
    given = {name: value for name, value in vars(chosen).items() if value is not None}
    sizes = {f"n_{name}": given[name] for name in given if hasattr(Settings, f"n_{name}")}
    if chosen.ratios:
        sizes["ratios"] = chosen.ratios
    settings = replace(SMALL if chosen.small else Settings(), **sizes)
    base = chosen.base or installed_base()
    bench = Bench(base, settings, n_threads=chosen.threads, report=_tell)
    facts = {
        "command": shlex.join(["python", "-m", "benchmarks.context", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "base": base.name,
        "settings": asdict(settings),
    }
    for name in chosen.part or PARTS:
        try:
            for result in PARTS[name](bench):
                keep(name, result, facts, chosen.output)
        except TextError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(markdown(result.table) + "\n")
    return 0


def keep(name: str, result: PartResult, facts: Mapping[str, Any], folder: Path) -> None:
    """Puts a part in the place of what an earlier run gave for it."""
    path = folder / "context.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {**facts, "table": asdict(result.table), "values": result.values}
    ordered = {part: known[part] for part in PARTS if part in known}
    write_json(path, ordered)
    write_text(folder / "context.md", "\n\n".join(map(_section, ordered.values())) + "\n")
    if result.draw is not None:
        result.draw(folder / f"context_{name}.png")


def _ratios(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _section(part: Mapping[str, Any]) -> str:
    told = f"`{part['command']}` at {part['commit']}, base {part['base']}"
    return f"{markdown(Table(**part['table']))}\n\n{told}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
