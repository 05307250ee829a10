"""Perplexities under packs, beside LoRA adapters that were trained on the same blocks.

Nothing here is timed: every value is computed once (see quality/stages.py) and all rounds see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.quality.corpora import DOMAINS, MEASURED, OTHERS
from benchmarks.quality.stages import (
    COMPARED,
    KINDS,
    lora_results,
    result,
)
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

DEVICE_VARIABLE = "MODULARBASE_BENCH_DEVICE"

ROUNDING = 1.01  # what INT4 experts may cost
HARM = 1.01  # what a pack may cost on texts of other domains

Perplexities = Mapping[str, Mapping[str, float]]


def cases(_: Settings) -> Iterator[Case]:
    """Yields the comparisons that have a target."""
    twin, engine = _twin(), _engine()
    for domain in DOMAINS:
        yield _case(
            f"{domain}: a pack beside LoRA adapters",
            {f"LoRA, {kind}": _best_lora(domain, kind)["perplexity"][domain] for kind in KINDS},
            {"pack": twin[domain][domain]},
            1.0,
        )
        yield _case(
            f"{domain}: a pack beside a LoRA adapter with the same replay",
            {"LoRA": _best_lora(domain, "replay")["perplexity"][domain]},
            {"pack": twin[domain][domain]},
            1.0,
        )
        for text in (*(other for other in DOMAINS if other != domain), *OTHERS):
            yield _case(
                f"{text} under the pack {domain}",
                {"base": twin["base"][text]},
                {"pack": twin[domain][text]},
                1 / HARM,
            )
        yield _case(
            f"{domain}, engine: INT4 experts beside F16",
            {"F16": engine[domain]["F16"]},
            {"INT4": engine[domain]["INT4"]},
            1 / ROUNDING,
        )


def tables(_: Settings, __: Sequence[CaseResult], ___: Machine) -> list[Table]:
    """Adds every perplexity."""
    twin, engine, compared = _twin(), _engine(), result("agreement", _device())["perplexity"]
    rows = [[f"pack {name}" if name != "base" else name, *_row(twin, name)] for name in twin]
    best = []
    for domain in DOMAINS:
        for kind in KINDS:
            run, name = _best_lora(domain, kind), f"LoRA {domain}, {kind}"
            rows.append([name, *_row({**twin, name: run["perplexity"]}, name)])
            trained = f"{run['n_parameters'] / 1e6:.2f} M"
            best.append([name, trained, f"{run['rank']}", f"{run['learning_rate']:g}"])
    sides = [("base", "base"), ("F16", "pack, F16 experts")]
    agreement = [
        [label, f"{engine[COMPARED][name]:.3f}", f"{compared[name]:.3f}"] for name, label in sides
    ]
    rounded = [
        [domain, *(f"{engine[domain][name]:.3f}" for name in ("base", "F16", "INT4"))]
        for domain in DOMAINS
    ]
    return [
        Table("Perplexity of unseen text in PyTorch (change to the base)", ["", *MEASURED], rows),
        Table(
            "In the engine, own domain", ["pack", "base", "F16 experts", "INT4 experts"], rounded
        ),
        Table(f"The engine beside PyTorch, {COMPARED}", ["", "engine", "PyTorch"], agreement),
        Table("The best LoRA adapters", ["", "trained", "rank", "learning rate"], best),
    ]


def _case(
    name: str, baseline: Mapping[str, float], contenders: Mapping[str, float], target: float
) -> Case:
    return Case(
        name=name,
        unit="perplexity",
        better="lower",
        baseline={label: _known(value) for label, value in baseline.items()},
        contenders={label: _known(value) for label, value in contenders.items()},
        targets=dict.fromkeys(contenders, target),
    )


def _known(value: float) -> Measure:
    return lambda: value


def _row(found: Perplexities, name: str) -> list[str]:
    return [
        f"{found[name][text]:.2f} ({100 * (found[name][text] / found['base'][text] - 1):+.1f} %)"
        for text in MEASURED
    ]


def _twin() -> Perplexities:
    perplexities: Perplexities = result("twin", _device())["perplexity"]
    return perplexities


def _engine() -> Perplexities:
    perplexities: Perplexities = result("packs", _device())["perplexity"]
    return perplexities


def _best_lora(domain: str, kind: str) -> Mapping[str, Any]:
    return lora_results(domain, kind, _device())[0]


def _device() -> str:
    return os.environ.get(DEVICE_VARIABLE, "cpu")


SUITE = Suite("packs_quality", "What packs do to perplexity", cases, tables)
