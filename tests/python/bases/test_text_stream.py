"""Streamed text: whole characters only, and no part of a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_vocab import tiny_byte_level_metadata

from modularbase.bases.text_stream import StopMatcher, StreamDecoder
from modularbase.bases.tokenizer import Tokenizer
from modularbase.errors import InvalidRequestError, TokenizerError

TINY = Tokenizer.from_metadata(tiny_byte_level_metadata())
FEW_LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


@given(st.lists(st.integers(0, TINY.n_vocab - 1), max_size=40))
def test_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = StreamDecoder(TINY)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == TINY.decode_continuation(ids)


@given(st.text())
def test_every_piece_is_whole_characters(text: str) -> None:
    stream = StreamDecoder(TINY)
    shown = ""
    for token_id in TINY.encode_plain(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text and stream.finish() == ""


def test_a_cut_character_is_marked_at_the_end() -> None:
    stream = StreamDecoder(TINY)
    ids = TINY.encode_plain("é€")[:-1]
    assert stream.push_all(ids) == "é"
    assert stream.finish() == "\ufffd"


def test_stream_refuses_unknown_ids() -> None:
    with pytest.raises(TokenizerError):
        StreamDecoder(TINY).push(TINY.n_vocab)


def cut(text: str, points: list[int]) -> list[str]:
    bounds = [0, *sorted(p % (len(text) + 1) for p in points), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def text_before_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The oracle: the first position at which any stop has been completed."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(FEW_LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=10))
def test_stops_equal_the_oracle(text: str, stops: list[str], points: list[int]) -> None:
    expected, stop = text_before_stop(text, stops)
    matcher = StopMatcher(stops)
    shown = ""
    for piece in cut(text, points):
        shown += matcher.push(piece)
        assert expected.startswith(shown), "part of a stop got through"
    assert shown + matcher.finish() == expected
    assert matcher.matched == stop


@given(FEW_LETTERS, STOPS)
def test_nothing_is_held_that_cannot_be_a_stop(text: str, stops: list[str]) -> None:
    expected, _ = text_before_stop(text, stops)
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.push, text))
    held = expected[len(shown) :]
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("oneENDtwo") == "one"
    assert matcher.push("three") == "" and matcher.finish() == ""
    assert matcher.matched == "END"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], [3]])
def test_senseless_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(InvalidRequestError):
        StopMatcher(stops)
