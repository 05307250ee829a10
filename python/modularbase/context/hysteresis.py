"""Keeps a span from going back and forth when its score does."""

from __future__ import annotations

from collections.abc import Mapping


class Hysteresis:
    """Counts, for each span, the checks in a row that found its score low."""

    def __init__(self) -> None:
        """Begins with no span known."""
        self._n_low: dict[int, int] = {}

    def check(self, scores: Mapping[int, float], threshold: float, n_checks: int) -> frozenset[int]:
        """Takes one check's scores; returns the spans that have been low long enough.

        Args:
            scores: By a span's first position; a span that is left out begins anew.
            threshold: A score below it is low.
            n_checks: Low checks in a row, this one among them, that are enough.
        """
        self._n_low = {
            start: self._n_low.get(start, 0) + 1
            for start, score in scores.items()
            if score < threshold
        }
        return frozenset(start for start, n_low in self._n_low.items() if n_low >= n_checks)
