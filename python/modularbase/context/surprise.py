"""How little the model expected the tokens it generated, where that is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modularbase.context.forgetting import TokenRanges, position_after
from modularbase.context.scores import Scores
from modularbase.context.spans import Span


class Surprises:
    """The -log p of tokens of a conversation, by position."""

    def __init__(self) -> None:
        """Begins with none known."""
        self._known: dict[int, float] = {}

    def add(self, start: int, logprobs: Sequence[float]) -> None:
        """Takes the log-probabilities of the tokens from `start` on."""
        self._known |= {start + i: -logprob for i, logprob in enumerate(logprobs)}

    def truncate(self, n_tokens: int) -> None:
        """Takes note that only the first tokens are left."""
        self._known = {at: value for at, value in self._known.items() if at < n_tokens}

    def of_spans(self, spans: Sequence[Span]) -> Scores:
        """The mean of each span's tokens, [n_spans]; NaN where not all are known."""
        return np.array([self._mean(span) for span in spans])

    def forget(self, ranges: TokenRanges) -> None:
        """Takes note that tokens were taken out of the conversation."""
        moved = {position_after(at, ranges): value for at, value in self._known.items()}
        self._known = {at: value for at, value in moved.items() if at is not None}

    def _mean(self, span: Span) -> float:
        values = [self._known.get(at, np.nan) for at in range(span.said.start, span.said.end)]
        return float(np.mean(values))
