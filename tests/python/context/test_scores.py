"""Scores against their definition, and what happens when inputs are missing or all alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modularbase.context.hysteresis import Hysteresis
from modularbase.context.scores import Scores, SpanSignals, score_spans
from modularbase.errors import InvalidRequestError

RNG = np.random.default_rng(5)
N_SPANS = 12
ALL = np.ones(N_SPANS, dtype=np.bool_)


def z(values: Scores) -> Scores:
    standard: Scores = (values - values.mean()) / values.std()
    return standard


def random_signals() -> dict[str, Scores]:
    return {
        "attention_mass": RNG.uniform(1e-6, 1e-2, N_SPANS),
        "expected_attention": RNG.uniform(1e-6, 1e-2, N_SPANS),
        "similarity": RNG.uniform(-1, 1, N_SPANS),
        "surprise": RNG.uniform(0, 9, N_SPANS),
    }


def test_the_formula() -> None:
    m, e, sim, surprise = random_signals().values()
    found = score_spans(
        SpanSignals(attention_mass=m, expected_attention=e, similarity=sim, surprise=surprise), ALL
    )
    expected = 0.4 * z(np.log(m)) + 0.3 * z(np.log(e)) + 0.2 * z(sim) + 0.1 * z(surprise)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_only_candidates_are_compared() -> None:
    signals = random_signals()
    candidates = np.arange(N_SPANS) % 3 > 0
    found = score_spans(SpanSignals(**signals), candidates)
    assert np.isnan(found[~candidates]).all()
    alone = {name: values[candidates] for name, values in signals.items()}
    expected = score_spans(SpanSignals(**alone), candidates[candidates])
    np.testing.assert_allclose(found[candidates], expected, rtol=1e-9)


def test_weights_of_the_missing_go_to_the_rest() -> None:
    signals = random_signals()
    sim, surprise = signals["similarity"], signals["surprise"]
    found = score_spans(SpanSignals(similarity=sim, surprise=surprise), ALL)
    np.testing.assert_allclose(found, (2 * z(sim) + z(surprise)) / 3, rtol=1e-9)
    # One span of which nothing but its surprise is known.
    partly = sim.copy()
    partly[4] = np.nan
    found = score_spans(SpanSignals(similarity=partly, surprise=surprise), ALL)
    assert found[4] == pytest.approx(z(surprise)[4])
    others = ALL.copy()
    others[4] = False
    np.testing.assert_allclose(
        found[others], (2 * z(sim[others]) + z(surprise)[others]) / 3, rtol=1e-9
    )


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, 1e300, -3.5])
def test_constant_inputs_say_nothing(value: float) -> None:
    same = np.full(N_SPANS, value)
    sim = random_signals()["similarity"]
    assert not score_spans(SpanSignals(attention_mass=same), ALL).any()
    found = score_spans(SpanSignals(surprise=same, similarity=sim), ALL)
    np.testing.assert_allclose(found, 2 * z(sim) / 3, rtol=1e-9)


def test_nothing_known_and_nobody_to_compare() -> None:
    assert not score_spans(SpanSignals(), ALL).any()
    assert np.isnan(score_spans(SpanSignals(**random_signals()), ~ALL)).all()
    assert score_spans(SpanSignals(), ALL[:0]).shape == (0,)


@given(
    st.fixed_dictionaries(
        {name: arrays(np.float64, 6) for name in SpanSignals.__dataclass_fields__}
    ),
    arrays(np.bool_, 6),
)
def test_scores_of_candidates_are_finite(
    signals: dict[str, Scores], candidates: np.ndarray
) -> None:
    found = score_spans(SpanSignals(**signals), candidates)
    assert (np.isfinite(found) == candidates).all()


def test_another_length() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        score_spans(SpanSignals(similarity=np.zeros(3)), ALL)
    assert (caught.value.field, caught.value.found) == ("similarity", "(3,)")


def test_hysteresis_wants_low_scores_in_a_row() -> None:
    hysteresis = Hysteresis()
    low, high = {10: -1.0, 20: 0.5}, {10: 0.5, 20: 0.5}

    def check(scores: dict[int, float]) -> frozenset[int]:
        return hysteresis.check(scores, threshold=0.0, n_checks=2)

    assert [check(s) for s in (low, low, low)] == [frozenset(), {10}, {10}]
    assert [check(s) for s in (high, low, high, low, low)] == [set(), set(), set(), set(), {10}]
    assert [check(s) for s in ({}, low)] == [set(), set()]  # left out: it begins anew
    assert hysteresis.check({10: 0.0}, threshold=0.0, n_checks=1) == set()
    assert hysteresis.check({10: -0.1}, threshold=0.0, n_checks=1) == {10}
