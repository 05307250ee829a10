"""Comparing generations whose arithmetic may differ in rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modularbase import Result


def top2_gap(result: Result, step: int) -> float:
    """The lead of the likeliest token over the second, of a result with logprobs >= 2."""
    assert result.logprobs is not None
    first, second = sorted(result.logprobs[step].top.values(), reverse=True)[:2]
    return first - second


def assert_same_tokens(found: Sequence[int], expected: Result, gap: float) -> None:
    """Asserts equal greedy tokens up to the first step where `expected` led by less than `gap`.

    Args:
        found: Tokens to check.
        expected: Of the same request, generated with logprobs=2 or more.
        gap: Lead under which rounding may turn the order of the two likeliest tokens.
    """
    for step, (token, wanted) in enumerate(zip(found, expected.token_ids, strict=False)):
        if token != wanted:
            lead = top2_gap(expected, step)
            assert lead < gap, f"step {step}: {token} instead of {wanted}, which led by {lead}"
            return  # from here on the texts differ, and so may all that follows
    assert len(found) == len(expected.token_ids)


def n_clear_steps(result: Result, gap: float) -> int:
    """Steps before the first whose lead is under `gap`: what the check above covers."""
    unclear = (i for i in range(len(result.token_ids)) if top2_gap(result, i) < gap)
    return next(unclear, len(result.token_ids))


def assert_same_logprobs(found: Result, expected: Result, atol: float) -> None:
    """Asserts equal log-probabilities as far as the tokens agree; atol 0 is bit for bit."""
    assert found.logprobs is not None and expected.logprobs is not None
    same = [
        a.token_id == b.token_id for a, b in zip(found.logprobs, expected.logprobs, strict=True)
    ]
    n = same.index(False) if False in same else len(same)
    a = [entry.logprob for entry in found.logprobs[:n]]
    b = [entry.logprob for entry in expected.logprobs[:n]]
    if atol == 0:
        assert a == b
    else:
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)
