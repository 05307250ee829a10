"""How much spans have to do with the newest message, by the words they share."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from modularbase.context.scores import Scores
from modularbase.context.spans import Span

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")
_IS_CJK = re.compile(rf"[{_CJK}]")
_STEM_LETTERS = 4  # "meeting" and "meet", "clocks" and "clockmaker"


def similarity_to_newest(spans: Sequence[Span]) -> Scores:
    """The share of the newest message of a user that each span has, [n_spans].

    Words count by how rare they are among the spans (inverse document frequency, Sparck Jones
    1972), by their first letters only. Unlike a cosine this does not fall with a span's length: a
    question is short, and what answers it says more. Of Chinese, Japanese and Korean, pairs of
    letters count.

    Args:
        spans: Of `spans_of`: the whole conversation.

    Returns:
        0 to 1; spans of the newest message and of later ones have 1. All 0 where there is no
        message of a user.
    """
    newest = max((s.message_index for s in spans if s.role == "user" and _is_said(s)), default=None)
    if newest is None:
        return np.zeros(len(spans))
    terms = [_terms(span.said.text) if _is_said(span) else frozenset[str]() for span in spans]
    rarity = _rarity(terms)
    asked = frozenset[str]().union(
        *(found for s, found in zip(spans, terms, strict=True) if s.message_index == newest)
    )
    total = math.fsum(rarity[term] for term in sorted(asked))
    return np.array(
        [
            1.0 if span.message_index >= newest else _share(sorted(asked & found), rarity, total)
            for span, found in zip(spans, terms, strict=True)
        ]
    )


def _is_said(span: Span) -> bool:
    return span.kind != "control"


def _share(shared: Iterable[str], rarity: dict[str, float], total: float) -> float:
    return math.fsum(rarity[term] for term in shared) / total if total > 0.0 else 0.0


def _rarity(terms: Sequence[frozenset[str]]) -> dict[str, float]:
    n_spans = sum(1 for found in terms if found)
    n_with = Counter(term for found in terms for term in found)
    return {term: math.log(n_spans / n) for term, n in n_with.items()}


@lru_cache(maxsize=4096)  # a turn asks of all spans twice
def _terms(text: str) -> frozenset[str]:
    terms: set[str] = set()
    for word in _WORD.findall(text.casefold()):
        if _IS_CJK.match(word):
            terms.update(word[i : i + 2] for i in range(max(1, len(word) - 1)))
        else:
            terms.add(word[:_STEM_LETTERS])
    return frozenset(terms)
