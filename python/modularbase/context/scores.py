"""How much a span without a floor matters, from what the model shows of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from modularbase.errors import InvalidRequestError

Scores: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# What a user says goes last: it may be a rule in words that no lexicon knows. It is one standard
# deviation, so what the model shows can still outweigh it.
USER_BONUS = 1.0

_SMALLEST = 1e-30  # of a share of attention, before its logarithm is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSignals:
    """What is known of each span, [n_spans] each; what is None or NaN is unknown.

    Attributes:
        attention_mass: Mean share of attention that the last queries give to a token of the span.
        expected_attention: The same for queries to come (arXiv:2510.00636).
        similarity: Cosine to what the conversation is about now.
        surprise: Mean of -log p over its tokens.
    """

    attention_mass: Scores | None = None
    expected_attention: Scores | None = None
    similarity: Scores | None = None
    surprise: Scores | None = None


_WEIGHTS = {"attention_mass": 0.4, "expected_attention": 0.3, "similarity": 0.2, "surprise": 0.1}
_LOGARITHMIC = ("attention_mass", "expected_attention")


def score_spans(signals: SpanSignals, candidates: Mask) -> Scores:
    """Weighs what is known of each span against the other candidates.

    S = 0.4 z(log m) + 0.3 z(log E) + 0.2 z(sim) + 0.1 z(surprise), where z takes the candidates'
    mean and divides by their standard deviation. The weights of what is unknown of a span go to
    the rest; a span of which nothing is known has 0, which is the mean.

    Args:
        signals: Of all spans.
        candidates: The spans to compare, [n_spans].

    Returns:
        Scores [n_spans]; NaN for spans that are no candidates.

    Raises:
        InvalidRequestError: An array is of another length.
    """
    total = np.zeros(len(candidates))
    weight_sum = np.zeros(len(candidates))
    for field in fields(SpanSignals):
        values = getattr(signals, field.name)
        if values is None:
            continue
        if np.shape(values) != candidates.shape:
            raise InvalidRequestError(
                field.name, f"one value for each of {len(candidates)} spans", str(np.shape(values))
            )
        wide = np.asarray(values, dtype=np.float64)
        if field.name in _LOGARITHMIC:
            wide = np.log(np.maximum(wide, _SMALLEST))
        known = np.isfinite(wide) & candidates
        weight = _WEIGHTS[field.name]
        total[known] += weight * _standardised(wide[known])
        weight_sum[known] += weight
    scores = np.divide(total, weight_sum, out=np.zeros_like(total), where=weight_sum > 0)
    scores[~candidates] = np.nan
    return scores


def _standardised(values: Scores) -> Scores:
    if not len(values):
        return values
    # Divided first: squares of large values would overflow.
    scale = float(np.abs(values).max())
    if scale == 0.0:
        return np.zeros_like(values)
    centred = values / scale - np.mean(values / scale)
    spread = float(np.sqrt(np.mean(np.square(centred))))
    # A spread of rounding errors is none.
    return centred / spread if spread > 1e-9 else np.zeros_like(values)
