"""What an engine knows of a conversation's spans, for those who grade them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from modularbase.context.scores import Scores, SpanSignals
from modularbase.context.similarity import similarity_to_newest
from modularbase.context.spans import Span
from modularbase.context.surprise import Surprises
from modularbase.conversation_host import Host

# Attention is looked at in every so many layers: they agree on what matters, and a look costs time.
_LAYER_STEP = 6

Look = Callable[[int, Sequence[tuple[int, int]], int], Sequence[float]]


def span_signals(
    host: Host,
    conversation: int,
    spans: Sequence[Span],
    undecided: AbstractSet[int],
    surprises: Surprises,
) -> SpanSignals:
    """What is known of spans.

    Attention costs time, so that of spans whose tier is decided it stays unknown.

    Args:
        host: The engine.
        conversation: Which one it is.
        spans: Of `spans_of`.
        undecided: First positions of those to look at, at least one, all before the window.
        surprises: Of its tokens.
    """
    n_layer = host.layout.n_layer
    layers = range(n_layer // 2 % _LAYER_STEP, n_layer, _LAYER_STEP)
    chosen = [i for i, span in enumerate(spans) if span.start in undecided]
    # Marks draw much attention, whatever they open.
    places = [(spans[i].said.start, spans[i].said.n_tokens) for i in chosen]

    def seen(look: Look) -> Scores:
        attention: Scores = np.full(len(spans), np.nan)
        looks = [look(conversation, places, layer) for layer in layers]
        attention[chosen] = np.mean(looks, axis=0)
        return attention

    return SpanSignals(
        attention_mass=seen(host.runtime.attention_received),
        expected_attention=seen(host.runtime.expected_attention),
        similarity=similarity_to_newest(spans),
        surprise=surprises.of_spans(spans),
    )
