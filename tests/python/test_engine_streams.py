"""Text as it comes: pieces, stop strings, whole characters, cancelling."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine
from modularbase.errors import CancelledError
from tests.tools.tiny_models import N_VOCAB
from tests.tools.tiny_requests import ids, load

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
A, B = ord("a"), ord("b")
# Only these two letters, nearly at random: stop strings begin everywhere and rarely go on.
LETTERS: dict[str, Any] = {
    "temperature": 5.0,
    "min_p": 0.0,
    "top_p": 1.0,
    "logit_bias": {i: -math.inf for i in range(N_VOCAB) if i not in (A, B)},
}


@pytest.fixture
def busy_engine(chat_model: Path) -> Iterator[Engine]:
    """An engine with 30 neighbours, so that a test sees its request before it has ended."""
    with load(chat_model, kv_budget_bytes=64 << 20) as engine:
        for seed in range(30):
            engine.submit(ids(10, seed=seed + 1), max_tokens=500, **GREEDY)
        yield engine


def wait_until_idle(engine: Engine) -> None:
    """Fails where a request goes on."""
    deadline = time.monotonic() + 5
    while engine.stats["n_running"] or engine.stats["n_waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pieces_join_to_the_result(engine: Engine) -> None:
    generation = engine.submit(ids(10), max_tokens=50, **GREEDY)
    pieces = list(generation)
    result = generation.result()
    assert generation.finished()
    assert "".join(piece.text for piece in pieces) == result.text
    assert [i for piece in pieces for i in piece.token_ids] == result.token_ids
    assert list(generation) == pieces  # again from the first
    assert generation.result() == result
    assert "".join(engine.stream(ids(10), max_tokens=50, **GREEDY)) == result.text


def test_pieces_come_before_the_end(busy_engine: Engine) -> None:
    generation = busy_engine.submit(ids(10), max_tokens=480, **GREEDY)
    first = next(iter(generation))
    assert not generation.finished()
    assert first.token_ids == generation.result().token_ids[: len(first.token_ids)]


def test_a_stream_never_splits_a_character(engine: Engine) -> None:
    # The two bytes of é take turns: each is penalised right after it was chosen.
    turns: dict[str, Any] = {
        "logit_bias": {0xC3: 60.0, 0xA9: 60.0},
        "presence_penalty": 100.0,
        "repeat_last_n": 1,
    }
    prompt = [*ids(5), 0xA9]
    pieces = list(engine.submit(prompt, max_tokens=81, **GREEDY, **turns))
    assert [i for piece in pieces for i in piece.token_ids] == [0xC3, 0xA9] * 40 + [0xC3]
    # The last byte never came: only there is it marked.
    assert "".join(piece.text for piece in pieces) == "é" * 40 + "\ufffd"
    assert all(set(piece.text) <= {"é"} for piece in pieces[:-1])
    assert "".join(engine.stream(prompt, max_tokens=80, **GREEDY, **turns)) == "é" * 40


@pytest.mark.parametrize("seed", range(12))
def test_stops_end_the_text_and_never_leak(engine: Engine, seed: int) -> None:
    arguments: dict[str, Any] = {**LETTERS, "max_tokens": 120, "seed": seed}
    whole = engine.generate(ids(5), **arguments).text
    assert set(whole) == {"a", "b"}
    draw = random.Random(seed)
    stops = ["".join(draw.choices("ab", k=draw.randint(2, 9))) for _ in range(3)] + ["c"]
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    end = min(ends, default=len(whole))
    longest = max((s for s in stops if whole[:end].endswith(s) and ends), key=len, default="")
    expected = whole[: end - len(longest)]

    shown = ""
    for piece in engine.stream(ids(5), **arguments, stop=stops):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected
    result = engine.generate(ids(5), **arguments, stop=stops)
    assert result.text == expected
    assert result.finish_reason == ("stop" if longest else "length")
    # As many tokens as it took to see the stop, one a letter.
    assert len(result.token_ids) == result.usage.completion_tokens == end


def test_a_stop_frees_the_engine(own_engine: Engine) -> None:
    result = own_engine.generate(ids(5), logit_bias={A: 100.0}, stop="aaa", **GREEDY)
    assert (result.text, result.finish_reason) == ("", "stop")
    wait_until_idle(own_engine)
    assert own_engine.generate(ids(5), logit_bias={A: 100.0}, stop=["ab"], max_tokens=3).text == (
        "aaa"  # held back as the begin of a stop that did not come
    )


def test_cancel(busy_engine: Engine, engine: Engine) -> None:
    whole = engine.generate(ids(10), max_tokens=480, **GREEDY)
    generation = busy_engine.submit(ids(10), max_tokens=480, **GREEDY)
    pieces = iter(generation)
    seen = next(pieces).token_ids
    generation.cancel()
    for piece in pieces:
        seen = seen + piece.token_ids
    assert generation.finished()
    assert 0 < len(seen) < 480
    assert seen == whole.token_ids[: len(seen)]
    with pytest.raises(CancelledError):
        generation.result()
    generation.cancel()  # again is fine


def test_cancelling_what_has_finished_changes_nothing(engine: Engine) -> None:
    generation = engine.submit(ids(10), max_tokens=2, **GREEDY)
    expected = generation.result()
    generation.cancel()
    assert generation.result() == expected


def test_leaving_a_stream_cancels(own_engine: Engine) -> None:
    stream = own_engine.stream(ids(10), max_tokens=480, **GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_until_idle(own_engine)


def test_result_with_a_timeout(busy_engine: Engine) -> None:
    generation = busy_engine.submit(ids(10), max_tokens=480, stop="\0\0\0", **GREEDY)
    with pytest.raises(TimeoutError):
        generation.result(timeout_s=0)
    assert len(generation.result().token_ids) == 480
