"""What was measured as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.context.fidelity import FidelityRow
from benchmarks.context.measured_dialogues import Answer, DialogueOutcome
from benchmarks.context.metrics import Estimate, estimate, fidelity
from benchmarks.context.recall import RecallOutcome
from benchmarks.report import Table

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class DialogueRow:
    """One system over dialogues; intervals are over them.

    Attributes:
        fidelity: To the exact system, on the turns that follow.
        n_dialogues: How many.
        n_tokens: Of one, in the mean.
        obeyed: Share of the first turn's rules that answers obey.
        beyond_exact: The same, less that of the exact system.
        known: By kind, the share of facts that are in the answers to their questions.
        fact_nll: Of the right answers, nats a token; None: no facts were asked for.
    """

    fidelity: FidelityRow
    n_dialogues: int
    n_tokens: float
    obeyed: Estimate
    beyond_exact: Estimate
    known: Mapping[str, float]
    fact_nll: Estimate | None


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
        for asked in (kinds, *([kind] for kind in kinds)):
            found = [float(o.is_found) for o in group if o.kind in asked]
            row.append(_interval(estimate(found), ".0f", scale=100))
        row.append(_interval(estimate([o.answer_nll for o in group]), ".3f"))
        rows.append(row)
    header = ["", "tier", "compression", "all, %", *(f"{kind}, %" for kind in kinds)]
    return Table(
        f"Needles found, of {len(group)} each", [*header, "NLL of the answer, nats a token"], rows
    )


def dialogue_rows(outcomes: Sequence[DialogueOutcome]) -> list[DialogueRow]:
    """Sums up by system, the exact one first."""
    by_name = dict(_groups(outcomes, lambda o: o.system))
    exact = next(iter(by_name.values()))
    return [_dialogue_row(group, exact) for group in by_name.values()]


def dialogue_table(rows: Sequence[DialogueRow]) -> Table:
    """A row a system."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.known))
    n_tokens = _mean(row.n_tokens for row in rows)
    header = ["", "dialogues", "compression", "KL to F16", "perplexity, %", "same top token, %"]
    header += ["rules obeyed, %", "against F16, points", *(f"{kind} known, %" for kind in kinds)]
    header += ["NLL of the facts, nats a token"]
    cells = [
        [
            row.fidelity.system,
            str(row.n_dialogues),
            f"{row.fidelity.compression:.2f}x",
            _interval(row.fidelity.fidelity.kl, ".4f"),
            _interval(row.fidelity.fidelity.perplexity_change, "+.2f", scale=100),
            _interval(row.fidelity.fidelity.top1, ".1f", scale=100),
            _interval(row.obeyed, ".0f", scale=100),
            _interval(row.beyond_exact, "+.1f", scale=100),
            *(f"{100 * row.known[kind]:.0f}" if kind in row.known else "-" for kind in kinds),
            _interval(row.fact_nll, ".3f") if row.fact_nll else "-",
        ]
        for row in rows
    ]
    return Table(
        f"Behind dialogues of {n_tokens:,.0f} tokens; value [95 % interval]", header, cells
    )


def _dialogue_row(
    outcomes: Sequence[DialogueOutcome], exact: Sequence[DialogueOutcome]
) -> DialogueRow:
    n_bytes, n_tokens = sum(o.n_bytes for o in outcomes), sum(o.n_tokens for o in outcomes)
    differences = [o.differences for o in outcomes]
    obeyed = [_obeyed(o.answers) for o in outcomes]
    asked = [answer for o in outcomes for answer in o.answers if answer.kind is not None]
    return DialogueRow(
        fidelity=FidelityRow(
            system=outcomes[0].system,
            compression=sum(o.n_bytes for o in exact) / n_bytes,
            bytes_per_token=n_bytes / n_tokens,
            fidelity=fidelity(differences),
            kl_by_document=[float(found.kl.mean()) for found in differences],
        ),
        n_dialogues=len(outcomes),
        n_tokens=n_tokens / len(outcomes),
        obeyed=estimate(obeyed),
        beyond_exact=estimate(
            [share - _obeyed(o.answers) for share, o in zip(obeyed, exact, strict=True)]
        ),
        known={
            str(kind): _mean(float(bool(answer.is_known)) for answer in group)
            for kind, group in _groups(asked, lambda answer: answer.kind)
        },
        fact_nll=estimate([_fact_nll(o.answers) for o in outcomes]) if asked else None,
    )


def _obeyed(answers: Sequence[Answer]) -> float:
    """Each dialogue counts with its mean: its probes are not independent."""
    return _mean(float(is_obeyed) for answer in answers for is_obeyed in answer.obeyed.values())


def _fact_nll(answers: Sequence[Answer]) -> float:
    return _mean(answer.nll for answer in answers if answer.nll is not None)


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
