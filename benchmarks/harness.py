"""Interleaved rounds of two sides, and the statistics of their ratio.

A case has a baseline (the peer) and contenders (ours), each a mapping from an option's name to a
measure. A round runs the baseline's options and then the contenders. The baseline counts with the
best of its options, chosen by median in the same run; options that crash, or are clearly behind
after the first round, are not run again. A ratio above 1 always means that the contender is better.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarks.peers.process import PeerRunError

Measure = Callable[[], float]
Report = Callable[[str], None]

# An option this far behind the best one in the first round is not run again: more than the
# spread seen between two runs of one option on a quiet machine.
CLEARLY_BEHIND = 0.85


@dataclass(frozen=True)
class Case:
    """One comparison: what is measured, by whom, and the ratio that is aimed at."""

    name: str
    unit: str
    baseline: Mapping[str, Measure]
    contenders: Mapping[str, Measure]
    better: Literal["higher", "lower"] = "higher"
    targets: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float | str] = field(default_factory=dict)

    def without_contenders(self) -> Case:
        """Returns the same case with the baseline alone."""
        return replace(self, contenders={})


@dataclass(frozen=True)
class Spread:
    """Median and extremes of the values of several rounds."""

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Summarises values, at least one."""
        return cls(statistics.median(values), min(values), max(values), list(values))


@dataclass(frozen=True)
class Comparison:
    """A contender against the best option of the baseline."""

    value: Spread
    ratio: Spread | None
    target: float | None

    @property
    def is_met(self) -> bool | None:
        """Says whether the median ratio reaches the target; None where there is none."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio.median >= self.target


@dataclass(frozen=True)
class CaseResult:
    """What the rounds of one case gave."""

    name: str
    unit: str
    better: str
    best_option: str | None
    baseline: dict[str, Spread]
    contenders: dict[str, Comparison]
    facts: dict[str, float | str]
    own_cpu_share: float  # CPU time this process used per second of the baseline's turns


def ratios(baseline: list[float], contender: list[float], better: str) -> list[float]:
    """Returns the ratio of each round, above 1 where the contender is better.

    Raises:
        ValueError: The sides differ in length, or a value is not above zero.
    """
    if len(baseline) != len(contender):
        raise ValueError(f"rounds: expected {len(baseline)}, found {len(contender)}")
    if min([*baseline, *contender], default=1.0) <= 0.0:
        raise ValueError("a measured value must be above zero")
    pairs = zip(baseline, contender, strict=True)
    return [ours / peer if better == "higher" else peer / ours for peer, ours in pairs]


def best_option(samples: Mapping[str, list[float]], better: str) -> str | None:
    """Returns the option with the best median among those that ran in every round."""
    n_rounds = max((len(values) for values in samples.values()), default=0)
    complete = {k: statistics.median(v) for k, v in samples.items() if v and len(v) == n_rounds}
    if not complete:
        return None
    choose = max if better == "higher" else min
    return choose(complete, key=lambda option: complete[option])


def promising(first: Mapping[str, float], better: str) -> list[str]:
    """Returns the options that are not clearly behind the best of a first round."""
    if not first:
        return []
    if better == "higher":
        best = max(first.values())
        return [option for option, value in first.items() if value >= CLEARLY_BEHIND * best]
    best = min(first.values())
    return [option for option, value in first.items() if value * CLEARLY_BEHIND <= best]


def summarise(
    case: Case,
    baseline: Mapping[str, list[float]],
    contenders: Mapping[str, list[float]],
    own_cpu_share: float = 0.0,
) -> CaseResult:
    """Turns the samples of all rounds into medians and ratios."""
    best = best_option(baseline, case.better)
    compared: dict[str, Comparison] = {}
    for label, values in contenders.items():
        ratio = Spread.of(ratios(baseline[best], values, case.better)) if best else None
        compared[label] = Comparison(Spread.of(values), ratio, case.targets.get(label))
    return CaseResult(
        name=case.name,
        unit=case.unit,
        better=case.better,
        best_option=best,
        baseline={label: Spread.of(values) for label, values in baseline.items() if values},
        contenders=compared,
        facts=dict(case.facts),
        own_cpu_share=own_cpu_share,
    )


def _own_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _try_option(case: Case, label: str, report: Report) -> float | None:
    """Measures an option of the baseline; one that crashes (None) does not count."""
    try:
        return case.baseline[label]()
    except PeerRunError as error:
        report(f"warning: {case.name}: {label} is left out: {error}")
        return None


def run_case(case: Case, n_rounds: int, report: Report) -> CaseResult:
    """Runs the rounds of a case, the baseline and the contenders in turn.

    Raises:
        ValueError: `n_rounds` is below 1.
    """
    if n_rounds < 1:
        raise ValueError(f"rounds: expected at least 1, found {n_rounds}")
    baseline: dict[str, list[float]] = {label: [] for label in case.baseline}
    contenders: dict[str, list[float]] = {label: [] for label in case.contenders}
    live = list(case.baseline)
    cpu_seconds = wall_seconds = 0.0
    for number in range(n_rounds):
        start, cpu_start = time.monotonic(), _own_cpu_seconds()
        for label in tuple(live):
            value = _try_option(case, label, report)
            if value is None:
                live.remove(label)
                continue
            baseline[label].append(value)
            report(f"{case.name}: round {number + 1}/{n_rounds} {label} {value:.4g}")
        wall_seconds += time.monotonic() - start
        cpu_seconds += _own_cpu_seconds() - cpu_start
        for label, measure in case.contenders.items():
            contenders[label].append(measure())
            value = contenders[label][-1]
            report(f"{case.name}: round {number + 1}/{n_rounds} {label} {value:.4g}")
        if number == 0:
            live = promising({label: baseline[label][0] for label in live}, case.better)
    share = cpu_seconds / wall_seconds if live and wall_seconds > 0.0 else 0.0
    return summarise(case, baseline, contenders, share)
