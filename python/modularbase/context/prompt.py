"""A prompt that no chat template wrote, as the sections that are graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Section
from modularbase.context.floors import SINK_TOKENS

_ID_SPAN_TOKENS = 64  # of ids, whose sentences nobody knows


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """A prompt, graded like one message of a user.

    Attributes:
        token_ids: All tokens.
        sections: The same by origin, in order and without gaps.
    """

    token_ids: tuple[int, ...]
    sections: tuple[Section, ...]


def text_prompt(text: str, tokenizer: Tokenizer) -> PlainPrompt:
    """A prompt of text, in the tokens that `Tokenizer.encode` gives.

    Raises:
        InvalidRequestError: Not a string, or not valid Unicode.
    """
    ids, starts = tokenizer.encode_with_starts(text)
    return PlainPrompt(tuple(ids), (_section(0, ids, starts, text),) if ids else ())


def ids_prompt(token_ids: Sequence[int]) -> PlainPrompt:
    """A prompt of tokens: they say nothing that a floor could follow from."""
    edges = [0, *range(SINK_TOKENS, len(token_ids), _ID_SPAN_TOKENS), len(token_ids)]
    return PlainPrompt(
        tuple(token_ids),
        tuple(
            _section(begin, token_ids[begin:end], [0] * (end - begin), "")
            for begin, end in pairwise(edges)
            if begin < end
        ),
    )


def _section(start: int, ids: Sequence[int], token_starts: Sequence[int], text: str) -> Section:
    return Section(
        start=start,
        token_ids=tuple(ids),
        token_starts=tuple(token_starts),
        text=text,
        message_index=0,
        role="user",
        is_control=False,
        tier=None,
    )
