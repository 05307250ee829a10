"""What was measured as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.context.fidelity import FidelityRow
from benchmarks.context.metrics import Estimate, estimate
from benchmarks.context.obedience import ProbeOutcome
from benchmarks.context.recall import RecallOutcome
from benchmarks.report import Table

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class ObedienceRow:
    """One system over all dialogues.

    Attributes:
        system: Its name.
        compression: Mean over the contexts of the last probed turn.
        obeyed: By turn, the share of rules that answers obey.
        known: The share of facts that are in the answers to their questions.
        reply_nll: Of scripted replies, in nats a token.
    """

    system: str
    compression: float
    obeyed: Mapping[int, Estimate]
    known: Estimate
    reply_nll: Estimate


def fidelity_table(rows: Sequence[FidelityRow], title: str) -> Table:
    """A row a system."""
    header = ["", "compression", "bytes a token", "KL to F16", "KL, 99th percentile"]
    header += ["perplexity, %", "same top token, %"]
    cells = [
        [
            row.system,
            f"{row.compression:.2f}x",
            f"{row.bytes_per_token:,.0f}",
            _interval(row.fidelity.kl, ".5f"),
            f"{row.fidelity.kl_p99:.4f}",
            _interval(row.fidelity.perplexity_change, "+.2f", scale=100),
            _interval(row.fidelity.top1, ".1f", scale=100),
        ]
        for row in rows
    ]
    return Table(f"{title}; value [95 % interval over documents]", header, cells)


def recall_table(outcomes: Sequence[RecallOutcome]) -> Table:
    """A row a system and tier: needles found of each kind, and the answers' loss."""
    kinds = list(dict.fromkeys(outcome.kind for outcome in outcomes))
    rows = []
    for (system, tier), group in _groups(outcomes, lambda o: (o.system, o.tier)):
        row = [system, tier or "any", f"{_mean(o.compression for o in group):.2f}x"]
        for kind in kinds:
            found = [float(o.is_found) for o in group if o.kind == kind]
            row.append(_interval(estimate(found), ".0f", scale=100))
        row.append(_interval(estimate([o.answer_nll for o in group]), ".3f"))
        rows.append(row)
    header = ["", "tier", "compression", *(f"{kind}, %" for kind in kinds)]
    return Table("Needles found", [*header, "NLL of the answer, nats a token"], rows)


def obedience_rows(outcomes: Sequence[ProbeOutcome]) -> list[ObedienceRow]:
    """Sums up by system; intervals are over dialogues."""
    return [_obedience_row(name, group) for name, group in _groups(outcomes, lambda o: o.system)]


def obedience_table(rows: Sequence[ObedienceRow]) -> Table:
    """A row a system."""
    turns = sorted({turn for row in rows for turn in row.obeyed})
    header = ["", "compression", *(f"rules at turn {turn}, %" for turn in turns)]
    header += ["facts known, %", "NLL of right replies, nats a token"]
    cells = [
        [
            row.system,
            f"{row.compression:.2f}x",
            *(_interval(row.obeyed[turn], ".0f", scale=100) for turn in turns),
            _interval(row.known, ".0f", scale=100),
            _interval(row.reply_nll, ".3f"),
        ]
        for row in rows
    ]
    return Table("Dialogues: rules of turn 1 that hold", header, cells)


def _obedience_row(system: str, outcomes: Sequence[ProbeOutcome]) -> ObedienceRow:
    by_turn = dict(_groups(outcomes, lambda o: o.turn))
    facts = [o for o in outcomes if o.is_known is not None]
    return ObedienceRow(
        system=system,
        compression=_mean(o.compression for o in by_turn[max(by_turn)]),
        obeyed={
            turn: _over_dialogues(group, lambda o: _mean(map(float, o.obeyed.values())))
            for turn, group in by_turn.items()
        },
        known=_over_dialogues(facts, lambda o: float(bool(o.is_known))),
        reply_nll=_over_dialogues(outcomes, lambda o: o.reply_nll),
    )


def _over_dialogues(
    outcomes: Sequence[ProbeOutcome], value: Callable[[ProbeOutcome], float]
) -> Estimate:
    """Each dialogue counts with its mean: its probes are not independent."""
    return estimate([_mean(map(value, group)) for _, group in _groups(outcomes, _dialogue)])


def _dialogue(outcome: ProbeOutcome) -> int:
    return outcome.dialogue


def _groups(items: Iterable[Item], key: Callable[[Item], Key]) -> Iterable[tuple[Key, list[Item]]]:
    """Items by key, in the order in which keys first come."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found.items()


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _interval(found: Estimate, form: str, *, scale: float = 1) -> str:
    value, low, high = (format(scale * v, form) for v in (found.value, found.low, found.high))
    return f"{value} [{low}..{high}]"
