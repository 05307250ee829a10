"""Predictions of the next packs: what they learn, and what always holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.errors import InvalidRequestError
from modularbase.routing.history import Turn
from modularbase.routing.predictor import PackPredictor, next_pack_probabilities

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


class Clock:
    """A time that tests set."""

    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def predictor(tmp_path: Path, clock: Clock) -> Iterator[PackPredictor]:
    with PackPredictor(tmp_path / "history.sqlite", half_life_s=DAY_S, now=clock) as predictor:
        yield predictor


def record_all(predictor: PackPredictor, clock: Clock, packs: str, user: str = "ada") -> None:
    """Records one turn a minute, a pack a letter."""
    for pack in packs:
        clock.now_s += 60
        predictor.record(user, [pack])


def likeliest(predictor: PackPredictor, user: str = "ada") -> str:
    return predictor.predict_next_packs(user, 1)[0].pack


def test_nothing_is_known_of_a_new_user(predictor: PackPredictor, clock: Clock) -> None:
    record_all(predictor, clock, "aaa", user="bob")
    assert predictor.predict_next_packs("ada", 5) == []


@pytest.mark.parametrize(("history", "following"), [("abcabc", "a"), ("abca", "b"), ("abcab", "c")])
def test_a_cycle_is_learned(
    history: str, following: str, predictor: PackPredictor, clock: Clock
) -> None:
    record_all(predictor, clock, history)
    assert likeliest(predictor) == following


def test_transitions_outweigh_frequency_and_back_off_to_it(
    predictor: PackPredictor, clock: Clock
) -> None:
    record_all(predictor, clock, "aaaaaaaabcabc" + "b")
    assert likeliest(predictor) == "c"  # though "a" is far more frequent
    record_all(predictor, clock, "z")
    assert likeliest(predictor) == "a"  # nothing followed "z" yet


def test_long_absence_backs_off_to_frequency(predictor: PackPredictor, clock: Clock) -> None:
    record_all(predictor, clock, "aaaaaaaabcabc" + "b")
    clock.now_s += 30 * DAY_S
    assert likeliest(predictor) == "a"


def test_recent_habits_count_more(predictor: PackPredictor, clock: Clock) -> None:
    record_all(predictor, clock, "oooo")
    clock.now_s += 5 * DAY_S
    record_all(predictor, clock, "nx")
    found = {p.pack: p.probability for p in predictor.predict_next_packs("ada", 3)}
    assert found["n"] > found["o"]


def test_the_formula_by_hand() -> None:
    turns = [Turn(("a",), 0.0), Turn(("b", "c"), 10.0), Turn(("a",), 20.0)]
    # Half life 10 s: weights 1/4, 1/2, 1. Read at 30 s: halved once more for transitions.
    frequency = {"a": 1.25 / 1.75, "b": 0.25 / 1.75, "c": 0.25 / 1.75}
    after_a = {"a": 0.0, "b": 0.125, "c": 0.125}
    expected = {p: (after_a[p] + 0.5 * frequency[p]) / (0.25 + 0.5) for p in "abc"}
    found = next_pack_probabilities(turns, at=30.0, half_life_s=10.0)
    assert found == pytest.approx(expected)


def test_equal_histories_give_equal_answers(tmp_path: Path) -> None:
    answers = []
    for name in ("one", "two"):
        clock = Clock()
        with PackPredictor(tmp_path / name, now=clock) as predictor:
            record_all(predictor, clock, "abcacbbca")
            answers.append(predictor.predict_next_packs("ada", 9))
            assert answers[-1] == predictor.predict_next_packs("ada", 9)
    assert answers[0] == answers[1]


def test_equal_probabilities_are_ordered_by_name(predictor: PackPredictor) -> None:
    for packs in (["z"], ["a", "a"], ["q"]):  # all at one time; nothing followed "q" yet
        predictor.record("ada", packs)
    found = predictor.predict_next_packs("ada", 9)
    assert [p.pack for p in found] == ["a", "q", "z"]
    assert [p.probability for p in found] == pytest.approx([1 / 3] * 3)


def test_an_explicit_time_is_used(predictor: PackPredictor) -> None:
    for pack, at in (("o", 0.0), ("o", 1.0), ("n", 9 * DAY_S), ("x", 9 * DAY_S)):
        predictor.record("ada", [pack], at=at)
    found = {p.pack: p.probability for p in predictor.predict_next_packs("ada", 3, at=9 * DAY_S)}
    assert found["n"] > found["o"]


def test_a_request_without_packs_changes_nothing(predictor: PackPredictor, clock: Clock) -> None:
    record_all(predictor, clock, "abab")
    predictor.acted_on("ada", ["a"])
    before = predictor.predict_next_packs("ada", 9)
    predictor.record("ada", [])
    assert predictor.predict_next_packs("ada", 9) == before
    assert (predictor.stats().hits, predictor.stats().wasted) == (0, 0)


turns = st.lists(
    st.builds(
        Turn,
        packs=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True).map(tuple),
        at=st.floats(allow_nan=False, allow_infinity=False),
    ),
    max_size=30,
)


@given(
    turns=turns,
    at=st.floats(allow_nan=False, allow_infinity=False),
    half_life_s=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_probabilities_are_a_distribution_at_any_time(
    turns: list[Turn], at: float, half_life_s: float
) -> None:
    found = next_pack_probabilities(turns, at, half_life_s)
    assert set(found) == {pack for turn in turns for pack in turn.packs}
    assert all(0 <= p <= 1 + 1e-12 for p in found.values())
    # Rounding of at most 30 sums.
    assert math.isclose(sum(found.values()), 1 if turns else 0, rel_tol=1e-9)


@settings(max_examples=40)  # each writes a file
@given(
    history=st.lists(st.text("ab医\x00'%", min_size=1, max_size=3), max_size=8),
    n=st.integers(0, 5),
)
def test_answers_are_sorted_and_at_most_n(history: list[str], n: int) -> None:
    with TemporaryDirectory() as folder, PackPredictor(Path(folder) / "history") as predictor:
        for i, pack in enumerate(history):
            predictor.record("ada", [pack], at=float(i))
        found = predictor.predict_next_packs("ada", n, at=float(len(history)))
    assert len(found) == min(n, len(set(history)))
    assert found == sorted(found, key=lambda p: (-p.probability, p.pack))
    assert sum(p.probability for p in found) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda p: p.predict_next_packs("ada", -1), "n"),
        (lambda p: p.record("", ["a"]), "user"),
        (lambda p: p.record("ada", ["a", ""]), "packs"),
        (lambda p: p.record("\ud800", ["a"]), "user"),
        (lambda p: p.acted_on("ada", ["\udfff"]), "packs"),
        (lambda p: p.record("ada", ["a"], at=math.nan), "at"),
        (lambda p: p.predict_next_packs("ada", 1, at=math.inf), "at"),
    ],
)
def test_senseless_arguments_are_named(call: Any, field: str, predictor: PackPredictor) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        call(predictor)
    assert caught.value.field == field
    assert predictor.predict_next_packs("ada", 1) == []


@pytest.mark.parametrize(
    "options", [{"half_life_s": 0}, {"max_uses_per_user": 0}, {"max_users": -1}]
)
def test_senseless_options_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        PackPredictor(tmp_path / "history.sqlite", **options)
