"""How much spans resemble the newest message, by the tokens they share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modularbase.context.chat import Sectioned
from modularbase.context.scores import Scores
from modularbase.context.spans import Span


def similarity_to_newest(chat: Sectioned, spans: Sequence[Span]) -> Scores:
    """Cosine of each span to the newest message of a user, [n_spans].

    Tokens count by how rare they are in the conversation (tf-idf, Salton and Buckley 1988), so what
    every sentence has says nothing. A span of the newest message itself, or of later ones, is 1.

    Args:
        chat: The conversation, or a prompt alone.
        spans: Of `cut_spans`.

    Returns:
        Cosines; all 0 where there is no message of a user.
    """
    newest = _newest_message(spans)
    counts = [Counter(chat.token_ids[span.start : span.end]) for span in spans]
    if newest is None:
        return np.zeros(len(spans))
    n_spans_with = Counter(token for count in counts for token in count)
    rarity = {token: math.log(len(spans) / n) for token, n in n_spans_with.items()}
    query = sum(
        (c for s, c in zip(spans, counts, strict=True) if _is_of(s, newest)), Counter[int]()
    )
    weights = _weighted(query, rarity)
    return np.array(
        [
            1.0 if span.message_index >= newest else _cosine(_weighted(count, rarity), weights)
            for span, count in zip(spans, counts, strict=True)
        ]
    )


def _newest_message(spans: Iterable[Span]) -> int | None:
    asked = [s.message_index for s in spans if s.role == "user" and s.kind != "control"]
    return max(asked, default=None)


def _is_of(span: Span, message_index: int) -> bool:
    return span.message_index == message_index and span.kind != "control"


def _weighted(count: Mapping[int, int], rarity: Mapping[int, float]) -> dict[int, float]:
    return {token: (1.0 + math.log(n)) * rarity[token] for token, n in count.items()}


def _cosine(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    dot = math.fsum(value * b.get(token, 0.0) for token, value in a.items())
    length = math.sqrt(math.fsum(v * v for v in a.values()) * math.fsum(v * v for v in b.values()))
    return dot / length if length > 0.0 else 0.0
