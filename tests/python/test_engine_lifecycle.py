"""Closing, many threads, asyncio, and Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modularbase import AsyncEngine, Engine, Generation
from modularbase.errors import CancelledError, InvalidRequestError
from tests.tools.tiny_requests import Request, ids, load

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
LONG: dict[str, Any] = {"max_tokens": 400, **GREEDY}
WAIT_S = 20  # far above what anything here takes; a hang fails instead of stalling the run


def crowd(engine: Engine) -> list[Generation]:
    """Thirty requests that take a while together."""
    return [engine.submit(ids(10, seed=seed), **LONG) for seed in range(30)]


@pytest.fixture
def roomy_engine(chat_model: Path) -> Iterator[Engine]:
    with load(chat_model, kv_budget_bytes=64 << 20) as engine:
        yield engine


def test_after_close(chat_model: Path) -> None:
    with load(chat_model) as engine:
        result = engine.submit(ids(5), max_tokens=3, **GREEDY)
        expected = result.result()
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(ids(5)),
        lambda: engine.submit(ids(5)),
        lambda: list(engine.stream(ids(5))),
        lambda: engine.chat([{"role": "user", "content": "x"}]),
        lambda: engine.score(ids(5)),
        lambda: engine.embed(ids(5)),
        lambda: engine.hidden(ids(5), 0),
    ]
    for call in calls:
        with pytest.raises(CancelledError, match="closed"):
            call()
    engine.close()
    assert result.result() == expected  # what it gave stays
    assert engine.info["n_layer"] > 0


def test_close_ends_all_that_runs(roomy_engine: Engine) -> None:
    running = crowd(roomy_engine)
    next(iter(running[0]))
    stream = roomy_engine.stream(ids(5), **LONG)
    next(stream)
    roomy_engine.close()
    for generation in running:
        with pytest.raises(CancelledError):
            generation.result(WAIT_S)
    with pytest.raises(CancelledError):  # and does not look like a finished text
        list(stream)


def test_close_from_many_threads(chat_model: Path) -> None:
    for _ in range(5):
        engine = load(chat_model)
        running = [engine.submit(ids(5), **LONG) for _ in range(2)]
        # Daemons: threads that hang would keep the process from ending.
        threads = [threading.Thread(target=engine.close, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert all(generation.finished() for generation in running)


def test_many_threads(engine: Engine) -> None:
    requests = [Request(ids(10 + i, seed=i), 20, seed=i) for i in range(8)]
    alone = [request.run(engine).token_ids for request in requests]
    scores = [engine.score(request.prompt).logprobs for request in requests]

    def work(i: int) -> None:
        request = requests[i % 8]
        for _ in range(5):
            assert request.run(engine).token_ids == alone[i % 8]
            assert (engine.score(request.prompt).logprobs == scores[i % 8]).all()
            assert "".join(engine.stream(request.prompt, max_tokens=5, **GREEDY))
            engine.submit(request.prompt, **LONG).cancel()
            assert engine.stats["n_running"] >= 0

    with ThreadPoolExecutor(24) as threads:
        for done in [threads.submit(work, i) for i in range(24)]:
            done.result(WAIT_S)


def test_one_generation_read_by_many_threads(engine: Engine) -> None:
    generation = engine.submit(ids(10), max_tokens=200, **GREEDY)
    expected = engine.generate(ids(10), max_tokens=200, **GREEDY)

    def read(i: int) -> str:
        return generation.result().text if i % 2 else "".join(p.text for p in generation)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(read, range(16), timeout=WAIT_S)) == {expected.text}


def test_a_refused_request_leaves_nothing_running(own_engine: Engine) -> None:
    for wrong in ({"stop": ""}, {"stop": 5}, {"logprobs": -1}, {"timeout_s": "soon"}):
        with pytest.raises(InvalidRequestError):
            own_engine.submit(ids(5), **LONG, **wrong)
    assert own_engine.stats["n_steps"] == 0
    own_engine.generate(ids(5), max_tokens=1, **GREEDY)
    assert own_engine.stats["n_steps"] == 1


def test_asyncio(chat_model: Path, engine: Engine) -> None:
    async def run() -> None:
        async with await AsyncEngine.load(chat_model, dtype="keep", n_threads=1) as awaited:
            results = await asyncio.gather(
                *(awaited.generate(ids(9, seed=i), max_tokens=20, **GREEDY) for i in range(12))
            )
            for i, result in enumerate(results):
                alone = engine.generate(ids(9, seed=i), max_tokens=20, **GREEDY)
                assert result.token_ids == alone.token_ids
            pieces = [piece async for piece in awaited.stream(ids(9), max_tokens=20, **GREEDY)]
            assert "".join(pieces) == engine.generate(ids(9), max_tokens=20, **GREEDY).text
            messages = [{"role": "user", "content": "hi"}]
            answer = await awaited.chat(messages, max_tokens=5, **GREEDY)
            assert answer.token_ids == engine.chat(messages, max_tokens=5, **GREEDY).token_ids
            assert (await awaited.score(ids(9))).perplexity == engine.score(ids(9)).perplexity
            assert ((await awaited.embed(ids(9))) == engine.embed(ids(9))).all()
            with pytest.raises(InvalidRequestError):
                await awaited.generate("")
        for call in (awaited.generate(ids(9)), awaited.score(ids(9)), awaited.embed(ids(9))):
            with pytest.raises(CancelledError, match="closed"):
                await call

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_cancelling_a_task_cancels_its_request(roomy_engine: Engine) -> None:
    async def run() -> None:
        awaited = AsyncEngine(roomy_engine)
        tasks = [asyncio.create_task(awaited.generate(ids(10, seed=i), **LONG)) for i in range(30)]
        async for _ in awaited.stream(ids(10), **LONG):
            break
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        while roomy_engine.stats["n_running"]:
            await asyncio.sleep(0.001)
        # So most of their tokens were never computed.
        assert roomy_engine.stats["n_rows"] < 30 * 400
        await awaited.close()

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


_ENDLESS = """
import sys
from modularbase import Engine
with Engine.load(sys.argv[1], n_threads=1) as engine:
    try:
        print("ready", flush=True)
        while True:
            WORK
    except KeyboardInterrupt:
        rest = engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True)
        print("interrupted", len(rest.token_ids), flush=True)
        raise
"""


@pytest.mark.parametrize(
    "work",
    [
        "engine.generate([1, 2], max_tokens=500, ignore_eos=True)",
        "list(engine.stream([1, 2], max_tokens=500, ignore_eos=True))",
        "engine.score([1] * 500)",
    ],
)
def test_ctrl_c(work: str, chat_model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS.replace("WORK", work), str(chat_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)  # into the work
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT_S)
    # Python's own end on Ctrl-C; the engine was still usable.
    assert process.returncode == -signal.SIGINT
    assert out == "interrupted 2\n"
    assert err.endswith("KeyboardInterrupt\n")
