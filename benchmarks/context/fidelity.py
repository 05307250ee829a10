"""Documents: what the text that follows a held context looks like to the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.context.documents import LongText
from benchmarks.context.metrics import Fidelity, TokenDifferences, differences, fidelity
from benchmarks.context.systems import ContextSystem
from benchmarks.harness import Report


@dataclass(frozen=True)
class FidelityRow:
    """One system over all documents.

    Attributes:
        system: Its name.
        compression: Bytes of the exact system's contexts over its own.
        bytes_per_token: Of the contexts.
        fidelity: To the exact system.
        kl_by_document: Means, in the documents' order.
    """

    system: str
    compression: float
    bytes_per_token: float
    fidelity: Fidelity
    kl_by_document: Sequence[float]


def measure_fidelity(
    exact: ContextSystem,
    systems: Sequence[ContextSystem],
    texts: Iterable[LongText],
    n_prefix: int,
    report: Report,
) -> list[FidelityRow]:
    """Lets each system hold the first tokens of each text and read the rest.

    Args:
        exact: What all are compared with.
        systems: Others.
        texts: Each longer than `n_prefix`, by two tokens or more.
        n_prefix: Tokens that are held.
        report: Told of each text.
    """
    found: dict[str, list[TokenDifferences]] = {system.name: [] for system in systems}
    n_bytes: dict[str, int] = dict.fromkeys([exact.name, *found], 0)
    n_tokens = 0
    for text in texts:
        prefix, rest = text.ids[:n_prefix], text.ids[n_prefix:]
        held = exact.hold(prefix)
        n_bytes[exact.name] += held.n_bytes
        n_tokens += len(prefix)
        reference = held.logits(rest)
        for system in systems:
            held = system.hold(prefix)
            n_bytes[system.name] += held.n_bytes
            found[system.name].append(differences(reference, held.logits(rest), rest))
            report(f"{text.name}: {system.name}: KL {found[system.name][-1].kl.mean():.5f}")
    return [
        FidelityRow(
            system=name,
            compression=n_bytes[exact.name] / n_bytes[name],
            bytes_per_token=n_bytes[name] / n_tokens,
            fidelity=fidelity(documents),
            kl_by_document=[float(document.kl.mean()) for document in documents],
        )
        for name, documents in found.items()
    ]
