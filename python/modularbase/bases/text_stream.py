"""Turns a stream of tokens into text that can be shown: whole characters, no piece of a stop."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from modularbase.bases.tokenizer import Tokenizer
from modularbase.errors import InvalidRequestError


class StreamDecoder:
    """Decodes tokens one by one; a character split over tokens is held back until it is whole.

    The pieces, joined, are `Tokenizer.decode_continuation` of all ids. One per request.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Takes one token, returns the text that is now certain (it may be empty)."""
        if self._tokenizer.is_control(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def push_all(self, ids: Iterable[int]) -> str:
        """Takes several tokens."""
        return "".join(map(self.push, ids))

    def finish(self) -> str:
        """Ends the stream: an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Ends text before the first stop string, and never lets a part of one through.

    The first stop is the one whose last character comes first; of several ending together, the
    longest. So the result does not depend on how the text was cut into pieces. One per request.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Takes the stop strings; none means that all text passes.

        Raises:
            InvalidRequestError: A stop is empty or not a string.
        """
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidRequestError("stop", "strings that are not empty", repr(stop))
        self._stops = tuple(stops)
        self._n_held_max = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._matched

    def push(self, text: str) -> str:
        """Takes text, returns what can be shown; after a match, nothing more."""
        if self._matched is not None:
            return ""
        text = self._held + text
        ends = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if ends:
            end, _, stop = min(ends)
            self._held, self._matched = "", stop
            return text[: end - len(stop)]
        n_held = self._n_partial(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """Ends the stream: what was held back turned out to be no stop."""
        held, self._held = self._held, ""
        return held

    def _n_partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop."""
        for n in range(min(self._n_held_max, len(text)), 0, -1):
            end = text[len(text) - n :]
            if any(stop.startswith(end) for stop in self._stops):
                return n
        return 0
