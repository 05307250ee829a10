"""Schedules drawn at random: chunk sizes, lengths, cancellations, memory limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modularbase import Engine, Result
from modularbase.errors import CancelledError
from tests.conftest import TinyModelFactory
from tests.tools.compare import assert_same_logprobs, assert_same_tokens
from tests.tools.tiny_requests import BITWISE_ROWS, ROUNDING, Request, block_bytes, ids, load

# The fixtures are the same for every example; the time of one depends on the machine's load.
common = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def alone(tiny_model: TinyModelFactory) -> Engine:
    """Runs requests one at a time, in bits that do not depend on chunks."""
    return load(tiny_model("qwen3").path, n_batch=BITWISE_ROWS, prefix_cache="off")


@dataclass(frozen=True)
class Job:
    """A request of a schedule, and the number of pieces after which it is cancelled."""

    request: Request
    cancelled_after: int | None


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    # Few beginnings, cut and continued anywhere: prefixes are shared in all ways.
    beginning = ids(160, seed=draw(st.integers(0, 1)))[: draw(st.integers(0, 160))]
    ending = ids(draw(st.integers(1, 80)), seed=draw(st.integers(2, 4)))
    request = Request(
        beginning + ending,
        n_tokens=draw(st.integers(1, 60)),
        seed=draw(st.none() | st.integers(0, 3)),
        n_draft=draw(st.sampled_from([0, 0, 3])),
    )
    return Job(request, draw(st.none() | st.none() | st.integers(0, 20)))


def check(job: Job, found: Result | None, seen: list[int], expected: Result) -> None:
    """Compares a finished job in full, a cancelled one as far as it came."""
    if found is None:
        assert seen == expected.token_ids[: len(seen)]
        return
    assert found.token_ids == expected.token_ids
    assert_same_logprobs(found, expected, atol=0)
    assert found.finish_reason == "length"
    assert found.usage.prompt_tokens == len(job.request.prompt)


@given(
    schedule=st.lists(jobs(), min_size=1, max_size=8),
    n_blocks=st.integers(6, 24),
    n_sequences=st.integers(1, 8),
    n_batch=st.integers(1, BITWISE_ROWS),
    prefix_cache=st.sampled_from(["on", "off"]),
)
@settings(common, max_examples=80)
def test_random_schedules(
    schedule: list[Job],
    n_blocks: int,
    n_sequences: int,
    n_batch: int,
    prefix_cache: str,
    alone: Engine,
) -> None:
    expected = [_alone(alone, job.request) for job in schedule]
    with load(
        alone.info["path"],
        kv_budget_bytes=n_blocks * block_bytes(alone),
        n_sequences=n_sequences,
        n_batch=n_batch,
        prefix_cache=prefix_cache,
    ) as engine:
        running = [job.request.submit(engine) for job in schedule]
        for job, generation, wanted in zip(schedule, running, expected, strict=True):
            seen: list[int] = []
            result = None
            if job.cancelled_after is not None:
                for n, piece in enumerate(generation):
                    seen += piece.token_ids
                    if n >= job.cancelled_after:
                        break
                generation.cancel()
            try:
                result = generation.result(60)
            except CancelledError:
                assert job.cancelled_after is not None
            check(job, result, seen, wanted)
        stats = engine.stats
        assert (stats["n_running"], stats["n_waiting"]) == (0, 0)
        # Blocks are free, or remembered as prefix: none is lost.
        assert stats["n_free_blocks"] + stats["n_cached_blocks"] == n_blocks


@given(n_batch=st.integers(1, 512), n_prompt=st.integers(1, 400), n_before=st.integers(0, 200))
@settings(common, max_examples=40)
def test_chunk_sizes(n_batch: int, n_prompt: int, n_before: int, alone: Engine) -> None:
    request = Request(ids(n_prompt, seed=7), 16)
    expected = _alone(alone, request)
    with load(alone.info["path"], n_batch=n_batch) as engine:
        # Something else decodes meanwhile, so that chunks also end where its rows leave no room.
        other = Request((*ids(n_before, seed=6), 1), 100).submit(engine)
        found = request.run(engine)
        other.cancel()
    assert_same_tokens(found.token_ids, expected, 2 * ROUNDING)
    assert_same_logprobs(found, expected, ROUNDING)


@lru_cache
def _alone(engine: Engine, request: Request) -> Result:
    return request.run(engine)
