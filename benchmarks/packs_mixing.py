"""Two packs of different domains in one request: what each domain loses beside its pack alone.

Nothing here is timed: every value is computed once (see quality/stages.py) and all rounds see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from benchmarks.harness import Case, CaseResult, Measure
from benchmarks.machine import Machine
from benchmarks.quality.corpora import DOMAINS
from benchmarks.quality.stages import POLICIES, WEIGHTS, pair_name, result
from benchmarks.report import Table
from benchmarks.suite import Settings, Suite

MIXING = 1.03  # what a second pack may cost


def cases(_: Settings) -> Iterator[Case]:
    """Yields every domain of every pair, both packs at weight 1."""
    found = _perplexities()
    for pair in combinations(DOMAINS, 2):
        for domain in pair:
            mixed = {policy: found[domain][pair_name(pair, policy)] for policy in POLICIES}
            yield Case(
                name=f"{domain}: {' + '.join(pair)} in one request",
                unit="perplexity",
                better="lower",
                baseline={"alone": _known(found[domain]["alone"])},
                contenders={policy: _known(value) for policy, value in mixed.items()},
                targets=dict.fromkeys(mixed, 1 / MIXING),
            )


def tables(_: Settings, __: Sequence[CaseResult], ___: Machine) -> list[Table]:
    """Adds blends at smaller weights."""
    found = _perplexities()
    rows = []
    for pair in combinations(DOMAINS, 2):
        for domain in pair:
            alone = found[domain]["alone"]
            blends = [found[domain][pair_name(pair, "blend", weight)] for weight in WEIGHTS]
            shown = [f"{blend:.3f} ({100 * (blend / alone - 1):+.1f} %)" for blend in blends]
            rows.append([domain, " + ".join(pair), f"{alone:.3f}", *shown])
    header = ["text", "packs", "its own alone", *(f"{weight:g} each" for weight in WEIGHTS)]
    return [Table("Blends by weight", header, rows)]


def _perplexities() -> Mapping[str, Mapping[str, float]]:
    found: Mapping[str, Mapping[str, float]] = result("mixing", "cpu")["perplexity"]
    return found


def _known(value: float) -> Measure:
    return lambda: value


SUITE = Suite("packs_mixing", "Two packs in one request", cases, tables)
