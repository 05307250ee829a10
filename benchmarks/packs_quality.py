"""Perplexities under packs, beside LoRA adapters that were trained on the same blocks.

Nothing here is timed: every value is computed once (see quality/stages.py) and all rounds see it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.quality.corpora import DOMAINS, MEASURED, OTHERS
from benchmarks.quality.stages import KINDS, POLICIES, lora_results, pair_name, result
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

DEVICE_VARIABLE = "MODULARBASE_BENCH_DEVICE"

ROUNDING = 1.01  # what INT4 experts may cost
HARM = 1.01  # what a pack may cost on texts of other domains
MIXING = 1.03  # what a second pack may cost

Perplexities = Mapping[str, Mapping[str, float]]


def cases(_: Settings) -> Iterator[Case]:
    """Yields the comparisons that have a target."""
    found = _packs()
    for domain in DOMAINS:
        yield _case(
            f"{domain}: a pack beside LoRA adapters",
            {f"LoRA, {kind}": _best_lora(domain, kind)["perplexity"][domain] for kind in KINDS},
            {"pack": found[domain][domain]},
            1.0,
        )
        yield _case(
            f"{domain}: INT4 experts beside F16",
            {"F16": found[f"{domain} F16"][domain]},
            {"INT4": found[domain][domain]},
            1 / ROUNDING,
        )
        for text in (*(other for other in DOMAINS if other != domain), *OTHERS):
            yield _case(
                f"{text} under the pack {domain}",
                {"base": found["base"][text]},
                {"pack": found[domain][text]},
                1 / HARM,
            )
    for pair in combinations(DOMAINS, 2):
        for domain in pair:
            mixed = {policy: found[pair_name(pair, policy)][domain] for policy in POLICIES}
            name = f"{domain} under {' + '.join(pair)}"
            yield _case(name, {"alone": found[domain][domain]}, mixed, 1 / MIXING)


def tables(_: Settings, __: Sequence[CaseResult], ___: Machine) -> list[Table]:
    """Adds every perplexity, and where both sides measured the same, how far they agree."""
    found = _packs()
    twin: Perplexities = result("twin", _device())["perplexity"]
    runs = {
        f"LoRA {domain}, {kind}": _best_lora(domain, kind) for domain in DOMAINS for kind in KINDS
    }
    rows = [["base", *_row(found["base"], found["base"])]]
    for domain in DOMAINS:
        rows += [
            [f"pack {name}", *_row(found[name], found["base"])]
            for name in (domain, f"{domain} F16")
        ]
    rows += [[name, *_row(run["perplexity"], twin["base"])] for name, run in runs.items()]
    agreement = [
        [
            name,
            *(f"{100 * (found[theirs][text] / twin[name][text] - 1):+.2f} %" for text in MEASURED),
        ]
        for name, theirs in (("base", "base"), *((d, f"{d} F16") for d in DOMAINS))
    ]
    best = [
        [name, f"{run['n_parameters'] / 1e6:.2f} M", f"{run['rank']}", f"{run['learning_rate']:g}"]
        for name, run in runs.items()
    ]
    return [
        Table("Perplexity of held-out text (change against the base)", ["", *MEASURED], rows),
        Table("The engine's perplexity against PyTorch's", ["", *MEASURED], agreement),
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


def _row(found: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
    return [
        f"{found[text]:.3f} ({100 * (found[text] / base[text] - 1):+.1f} %)" for text in MEASURED
    ]


def _packs() -> Perplexities:
    perplexities: Perplexities = result("packs", _device())["perplexity"]
    return perplexities


def _best_lora(domain: str, kind: str) -> Mapping[str, Any]:
    return lora_results(domain, kind, _device())[0]


def _device() -> str:
    return os.environ.get(DEVICE_VARIABLE, "cpu")


SUITE = Suite("packs_quality", "What packs do to perplexity", cases, tables)
