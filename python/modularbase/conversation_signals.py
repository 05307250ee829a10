"""What an engine knows of a conversation's spans, for those who grade them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    host: Host, conversation: int, spans: Sequence[Span], n_past: int, surprises: Surprises
) -> SpanSignals:
    """What is known of spans.

    Attention is what the window's queries give, so that only spans before it get any.

    Args:
        host: The engine.
        conversation: Which one it is.
        spans: Of `cut_spans`.
        n_past: Tokens before the window.
        surprises: Of its tokens.
    """
    n_layer = host.layout.n_layer
    layers = range(n_layer // 2 % _LAYER_STEP, n_layer, _LAYER_STEP)
    places = [(span.start, span.n_tokens) for span in spans if span.end <= n_past]

    def seen(look: Look) -> Scores:
        attention: Scores = np.full(len(spans), np.nan)
        if places:
            looks = [look(conversation, places, layer) for layer in layers]
            attention[: len(places)] = np.mean(looks, axis=0)
        return attention

    return SpanSignals(
        attention_mass=seen(host.runtime.attention_received),
        expected_attention=seen(host.runtime.expected_attention),
        similarity=similarity_to_newest(spans),
        surprise=surprises.of_spans(spans),
    )
