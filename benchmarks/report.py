"""Results as Markdown tables for people and as JSON for programs."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.harness import CaseResult, Comparison
from benchmarks.machine import Machine
from benchmarks.paths import ROOT
from benchmarks.peers import build

# Above this other programs shift the results: both sides wait for every thread at each operation.
BUSY_CORES = 0.1
# Above this the engine took a visible part of a core while the peer was being measured.
BUSY_SHARE = 0.05


@dataclass(frozen=True)
class Table:
    """A titled table of text cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(table: Table) -> str:
    """Returns a table in Markdown, columns padded to be read as plain text too."""
    rows = [list(table.header), *[list(row) for row in table.rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"### {table.title}", "", lines[0], rule, *lines[1:]])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _verdict(comparison: Comparison) -> str:
    if comparison.is_met is None:
        return ""
    return "met" if comparison.is_met else "missed"


def results_table(title: str, results: Sequence[CaseResult]) -> Table:
    """Returns one row a contender, or one row a case where only the baseline ran."""
    rows: list[list[str]] = []
    for result in results:
        peer = result.baseline[result.best_option] if result.best_option else None
        peer_cell = f"{_number(peer.median)} ({result.best_option})" if peer else "-"
        compared_or_none: dict[str, Comparison | None] = {**result.contenders} or {"-": None}
        for label, compared in compared_or_none.items():
            ratio = compared.ratio if compared else None
            rows.append(
                [
                    f"{result.name}, {result.unit}",
                    peer_cell,
                    f"{_number(compared.value.median)} ({label})" if compared else "-",
                    f"{ratio.median:.2f} [{ratio.low:.2f}..{ratio.high:.2f}]" if ratio else "-",
                    f">= {compared.target:g}" if compared and compared.target else "",
                    _verdict(compared) if compared else "",
                ]
            )
    header = ["case", "baseline (best option)", "ours", "ratio [min..max]", "target", ""]
    return Table(title, header, rows)


def warnings(machine: Machine, results: Sequence[CaseResult]) -> list[str]:
    """Returns what makes a result doubtful, in words."""
    found = [
        f"{result.name}: this process used {result.own_cpu_share:.0%} of a core while the "
        "baseline ran, so the baseline may read low"
        for result in results
        if result.own_cpu_share > BUSY_SHARE
    ]
    if machine.others_busy_cores > BUSY_CORES:
        found.append(
            f"other programs kept {machine.others_busy_cores:.1f} cores busy before the run: "
            "these numbers show that the benchmarks work, not how fast anything is"
        )
    return found


def commit() -> str:
    """Returns the commit of the sources, with a mark where they were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _own_version() -> str:
    try:
        return metadata.version("modularbase")
    except metadata.PackageNotFoundError:
        return "not installed"


def document(
    name: str, machine: Machine, results: Sequence[CaseResult], tables: Sequence[Table]
) -> dict[str, object]:
    """Returns the JSON document of one benchmark."""
    return {
        "name": name,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "modularbase": _own_version(),
            "peer": f"llama.cpp of llama-cpp-python {build.VERSION}",
            "python": platform.python_version(),
        },
        "machine": asdict(machine),
        "warnings": warnings(machine, results),
        "cases": [asdict(result) for result in results],
        "tables": [asdict(table) for table in tables],
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    """Writes a JSON document, complete or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)
