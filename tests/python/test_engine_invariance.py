"""A request gives the same tokens whatever runs beside it and however it is computed.

Requests that run alone are the oracle: other tests hold them against transformers and llama.cpp.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from modularbase import Result
from tests.conftest import TinyModelFactory
from tests.tools.compare import assert_same_logprobs, assert_same_tokens, n_clear_steps
from tests.tools.tiny_requests import (
    BITWISE_ROWS,
    ROUNDING,
    ROUNDING_BF16,
    Request,
    block_bytes,
    ids,
    load,
)

FAMILIES = ["llama", "qwen2", "qwen3"]
PATHS: list[dict[str, Any]] = [
    {"attention": "reference"},
    {"linear": "reference"},
    {"attention": "reference", "linear": "reference"},
    {"prefix_cache": "off"},
    {"n_batch": BITWISE_ROWS},
]

ROOMY = 8 << 20  # bytes of KV for all that run at once: nobody is preempted
request = Request(ids(40, seed=9), 32)
neighbours = [Request(ids(20 + i, seed=i), 300) for i in range(8)]


def assert_same(found: Result, expected: Result) -> None:
    """The same bits."""
    assert found.token_ids == expected.token_ids
    assert_same_logprobs(found, expected, atol=0)
    assert found.text == expected.text


def assert_close(found: Result, expected: Result, atol: float = ROUNDING) -> None:
    """The same to rounding; a lead can shrink by twice what a log-probability can."""
    assert_same_tokens(found.token_ids, expected, 2 * atol)
    assert_same_logprobs(found, expected, atol)


@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_beside_eight_others(
    family: str, seed: int | None, tiny_model: TinyModelFactory
) -> None:
    path = tiny_model(family).path
    wanted = Request(request.prompt, request.n_tokens, seed)
    with load(path) as engine:
        expected = wanted.run(engine)
        n_steps_alone = engine.stats["n_steps"]
    with load(path, kv_budget_bytes=ROOMY) as engine:
        others = [neighbour.submit(engine) for neighbour in neighbours]
        found = wanted.run(engine)
        for other in others:
            assert len(other.result(60).token_ids) == 300
        # Had they run one after the other, it would be some 300 steps for each.
        assert engine.stats["n_steps"] < n_steps_alone + 5 * 300
    assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_neighbour_was_cancelled(family: str, tiny_model: TinyModelFactory) -> None:
    path = tiny_model(family).path
    long = Request(request.prompt, 400)
    with load(path) as engine:
        expected = long.run(engine)
    with load(path, kv_budget_bytes=ROOMY, prefix_cache="off") as engine:
        others = [neighbour.submit(engine) for neighbour in neighbours[:4]]
        running = long.submit(engine)
        next(iter(others[0]))
        for other in others[::2]:
            other.cancel()
        follower = Request(request.prompt, 60).submit(engine)  # takes blocks they gave back
        assert_same(running.result(60), expected)
        assert follower.result(60).token_ids == expected.token_ids[:60]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_that_diverges_inside_a_block(
    family: str, tiny_model: TinyModelFactory
) -> None:
    path = tiny_model(family).path
    common = ids(100, seed=1)  # a whole block of 64, and 36 of the next
    first = Request(common + ids(50, seed=2))
    second = Request(common + ids(50, seed=3))
    with load(path, prefix_cache="off", n_batch=BITWISE_ROWS) as engine:
        expected = [first.run(engine), second.run(engine)]
        assert second.run(engine).usage.cached_tokens == 0
    with load(path, n_batch=BITWISE_ROWS) as engine:
        assert_same(first.run(engine), expected[0])
        found = second.run(engine)
        assert found.usage.cached_tokens == 100
        assert_same(found, expected[1])
        # Both at once from the shared blocks, each writing its own copy.
        both = [first.submit(engine), second.submit(engine)]
        for generation, wanted in zip(both, expected, strict=True):
            again = generation.result(60)
            assert again.usage.cached_tokens == 149
            assert_same(again, wanted)


def test_a_prefix_that_another_request_is_still_extending(tiny_model: TinyModelFactory) -> None:
    path = tiny_model().path
    leader = Request(ids(130, seed=4), 300)
    follower = Request(leader.prompt[:128] + ids(20, seed=5), 60)
    with load(path, prefix_cache="off", n_batch=BITWISE_ROWS) as engine:
        expected = [leader.run(engine), follower.run(engine)]
    with load(path, n_batch=BITWISE_ROWS) as engine:
        leading = leader.submit(engine)
        next(iter(leading))  # its prompt is published, it goes on writing behind it
        found = follower.run(engine)
        assert found.usage.cached_tokens >= 128
        assert_same(found, expected[1])
        assert_same(leading.result(60), expected[0])


def test_a_generated_text_is_a_prefix_too(tiny_model: TinyModelFactory) -> None:
    path = tiny_model().path
    with load(path, n_batch=BITWISE_ROWS) as engine:
        whole = Request(request.prompt, 100).run(engine)
        rest = Request((*request.prompt, *whole.token_ids[:60]), 40).run(engine)
    assert rest.usage.cached_tokens == 99
    assert rest.token_ids == whole.token_ids[60:]


@pytest.mark.parametrize("options", PATHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_agree(family: str, options: dict[str, Any], tiny_model: TinyModelFactory) -> None:
    path = tiny_model(family).path
    wanted = [Request(ids(60 * n, seed=n), 32) for n in range(1, 6)]
    with load(path) as engine:
        expected = [each.run(engine) for each in wanted]
    with load(path, **options) as engine:
        for each, result in zip(wanted, expected, strict=True):
            assert_close(each.run(engine), result)
    # So much of it was compared.
    assert sum(n_clear_steps(result, 2 * ROUNDING) for result in expected) >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_agree_with_bf16_weights(family: str, tiny_model: TinyModelFactory) -> None:
    path = tiny_model(family).path
    wanted = Request(ids(90, seed=1), 24)
    with load(path, dtype="bf16") as engine:
        expected = wanted.run(engine)
    for options in PATHS:
        with load(path, dtype="bf16", **options) as engine:
            assert_close(wanted.run(engine), expected, ROUNDING_BF16)


def test_the_number_of_threads_changes_nothing(tiny_model: TinyModelFactory) -> None:
    # Few steps: on a busy machine two threads wait long for each other.
    path = tiny_model().path
    wanted = Request(ids(90, seed=1), 8)
    n_threads = min(2, len(os.sched_getaffinity(0)))
    with load(path) as one, load(path, n_threads=n_threads) as two:
        assert two.info["n_threads"] == n_threads
        assert_same(wanted.run(two), wanted.run(one))


@pytest.mark.parametrize("n_draft", [1, 4, 6, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_nothing(
    family: str, n_draft: int, tiny_model: TinyModelFactory
) -> None:
    path = tiny_model(family).path
    repeating = ids(12, seed=3) * 8
    with load(path) as engine:
        expected = Request(repeating, 150).run(engine)
    with load(path) as engine:
        found = Request(repeating, 150, n_draft=n_draft).run(engine)
    assert 0 < found.usage.accepted_tokens <= found.usage.drafted_tokens
    if n_draft < BITWISE_ROWS:
        assert_same(found, expected)
    else:
        assert_close(found, expected)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}], ids=str)
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_certified_head_chooses_what_the_full_one_does(
    family: str, dtype: str, sampling: dict[str, Any], tiny_model: TinyModelFactory
) -> None:
    path = tiny_model(family).path
    arguments = {**sampling, "max_tokens": 60, "ignore_eos": True}
    with load(path, dtype=dtype, head="full") as engine:
        assert engine.info["screen_bytes"] == 0
        expected = engine.generate(request.prompt, **arguments).token_ids
        # For the leads: asking for log-probabilities takes the full product anyway.
        clear = engine.generate(request.prompt, **arguments, logprobs=2)
    with load(path, dtype=dtype, head="certified") as engine:
        assert engine.info["screen_bytes"] > 0
        found = engine.generate(request.prompt, **arguments).token_ids
    if sampling["temperature"] == 0:
        assert expected == clear.token_ids
        assert_same_tokens(found, clear, 2 * ROUNDING)
    else:
        assert found == expected


@pytest.mark.parametrize("prefix_cache", ["on", "off"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(family: str, prefix_cache: str, tiny_model: TinyModelFactory) -> None:
    path = tiny_model(family).path
    requests = [Request(ids(30 + i, seed=i), 200, seed=i or None) for i in range(6)]
    with load(path, n_batch=BITWISE_ROWS) as engine:
        expected = [each.run(engine) for each in requests]
        n_bytes = 9 * block_bytes(engine)  # of 6 * 4 blocks that they grow to
    with load(
        path, n_batch=BITWISE_ROWS, kv_budget_bytes=n_bytes, prefix_cache=prefix_cache
    ) as engine:
        running = [each.submit(engine) for each in requests]
        found = [generation.result(60) for generation in running]
        n_rows = engine.stats["n_rows"]
    for result, wanted in zip(found, expected, strict=True):
        assert_same(result, wanted)
    if prefix_cache == "off":  # what was taken from them was computed again
        assert n_rows > sum(len(each.prompt) + each.n_tokens for each in requests)


@pytest.mark.parametrize("what", ["score", "hidden", "embed"])
def test_scores_and_hidden_states_survive_preemption(
    what: str, tiny_model: TinyModelFactory
) -> None:
    path = tiny_model().path
    text = ids(400, seed=8)
    ask: dict[str, Any] = {
        "score": lambda engine: engine.score(text).logprobs,
        "hidden": lambda engine: engine.hidden(text, 1),
        "embed": lambda engine: engine.embed(text),
    }
    after = Request(text[:390], 10)
    with load(path, n_batch=BITWISE_ROWS) as engine:
        expected = ask[what](engine)
        expected_after = after.run(engine)
        n_bytes = block_bytes(engine)
    older = [Request(ids(20 + i, seed=i), 120) for i in range(6)]
    for n_blocks in (13, 14, 15, 16):  # taken away early, late, or several times
        with load(path, n_batch=BITWISE_ROWS, kv_budget_bytes=n_blocks * n_bytes) as engine:
            running = [each.submit(engine) for each in older]
            found = ask[what](engine)
            for generation in running:
                generation.result(60)
            # Nor did it leave a prefix whose upper layers were never computed.
            assert_same(after.run(engine), expected_after)
        assert found.shape == expected.shape
        assert (found == expected).all()
