"""Packs that find no room: who waits, for how long, and who does not have to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modularbase import AsyncEngine, PackRequest, PackUse, pack_requests
from modularbase.errors import BudgetExceededError, CancelledError
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import (
    GREEDY,
    PROMPT,
    WAIT_S,
    answer,
    install_pack,
    leased,
    never,
    pack_file,
    tokens,
)
from tests.tools.tiny_requests import ids

# So long, who need not wait has gone on; who must wait, waits longer.
A_MOMENT_S = 0.3


def test_a_pack_that_waits_for_room_holds_up_no_other(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=2.6)
    for name in ("a", "c"):
        install_pack(tmp_path, name)
    install_pack(tmp_path, "wide", n_expert=6)  # takes more than a leaves
    with ThreadPoolExecutor(1) as threads:
        with leased(engine, "a"):
            waiting = threads.submit(answer, engine, never("wide"), timeout_s=WAIT_S)
            time.sleep(A_MOMENT_S)
            assert answer(engine, "c").packs[0].id == "c"  # its first use
            engine.packs.swap("c", str(pack_file(tmp_path, "c@2.0.0")))
            engine.packs.pin("c")
            engine.packs.unpin("c")
            engine.packs.forget("c")
            engine.packs.load("c")
            assert not waiting.done()
        assert waiting.result(WAIT_S).packs[0].id == "wide"


def test_two_who_wait_for_the_same_pack_keep_their_own_time(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=1)
    for name in ("a", "b"):
        install_pack(tmp_path, name)
    with ThreadPoolExecutor(1) as threads:
        with leased(engine, "a"):
            patient = threads.submit(answer, engine, never("b"), timeout_s=WAIT_S)
            time.sleep(A_MOMENT_S)
            began = time.monotonic()
            with pytest.raises(BudgetExceededError):
                engine.submit(ids(5), packs=never("b"), timeout_s=A_MOMENT_S)
            assert time.monotonic() - began < WAIT_S / 2
            assert not patient.done()
        assert patient.result(WAIT_S).packs[0].id == "b"


def test_what_never_fits_is_refused_at_once(
    pack_engines: PackEngineFactory, tmp_path: Path, slot_bytes: int
) -> None:
    engine = pack_engines(n_slots=0.9)
    path = str(pack_file(tmp_path))
    install_pack(tmp_path)
    began = time.monotonic()
    for call in (
        lambda: engine.packs.load(path, timeout_s=600),
        lambda: engine.packs.load("code", timeout_s=600),
        lambda: engine.submit(ids(5), packs=never("code"), timeout_s=600),
    ):
        with pytest.raises(BudgetExceededError) as caught:
            call()
        assert caught.value.needed_bytes == slot_bytes > caught.value.budget_bytes
    assert time.monotonic() - began < WAIT_S
    (step,) = answer(engine, "code").fallbacks
    assert "budget is smaller" in step.reason


@pytest.mark.parametrize("fallback", ["never", "on_failure"])
@pytest.mark.parametrize("use", ["first", "later"])
def test_no_room_in_time(
    use: str, fallback: Any, pack_engines: PackEngineFactory, tmp_path: Path, slot_bytes: int
) -> None:
    engine = pack_engines(n_slots=1)
    for name in ("b", "a"):
        install_pack(tmp_path, name)
    plain = tokens(engine)
    if use == "later":
        tokens(engine, "b")
    request = PackRequest(packs=(PackUse("b"),), fallback=fallback)
    with leased(engine, "a"), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(answer, engine, request, timeout_s=2 * A_MOMENT_S)
        while not waiting.done():
            assert tokens(engine) == plain  # which needs no pack
        with pytest.raises(BudgetExceededError) as caught:
            waiting.result()
        assert caught.value.pack_id == "b@1.0.0"
        assert caught.value.needed_bytes == caught.value.budget_bytes == slot_bytes
        assert engine.packs.status("a").n_leases == 1


def test_no_room_for_a_request_that_has_time_is_a_failure(
    pack_engines: PackEngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_requests, "_TIMEOUT_S", A_MOMENT_S)
    engine = pack_engines(n_slots=1)
    for name in ("b", "a"):
        install_pack(tmp_path, name)
    with leased(engine, "a"):
        result = answer(engine, "b")
        assert (result.packs, result.token_ids) == ((), tokens(engine))
        assert "no room" in result.fallbacks[0].reason
        with pytest.raises(BudgetExceededError):
            answer(engine, never("b"))
    assert answer(engine, "b").packs


def test_room_that_comes_free_in_time(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(n_slots=1)
    for name in ("b", "a"):
        install_pack(tmp_path, name)
    expected = tokens(engine, "b")
    with leased(engine, "a"):
        waiting = engine.submit(PROMPT, packs=never("b"), max_tokens=16, timeout_s=WAIT_S, **GREEDY)
        time.sleep(A_MOMENT_S)
        assert not waiting.finished()
    assert waiting.result(WAIT_S).token_ids == expected


def test_closing_ends_who_waits_for_room(pack_engines: PackEngineFactory, tmp_path: Path) -> None:
    engine = pack_engines(n_slots=1)
    for name in ("b", "a"):
        install_pack(tmp_path, name)
    running = engine.submit(PROMPT, packs="a", max_tokens=32_000, **GREEDY)
    next(iter(running))
    with ThreadPoolExecutor(2) as threads:
        calls: list[Callable[[], object]] = [
            lambda: answer(engine, "b"),
            lambda: engine.packs.load("b"),
        ]
        waiting = [threads.submit(call) for call in calls]
        time.sleep(A_MOMENT_S)
        assert not any(done.done() for done in waiting)
        engine.close()
        for done in waiting:
            with pytest.raises(CancelledError):
                done.result(WAIT_S)


def test_a_task_that_waits_for_room_holds_up_no_other(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_slots=1)
    for name in ("b", "a"):
        install_pack(tmp_path, name)
    plain = tokens(engine)
    arguments: dict[str, Any] = {"max_tokens": 16, **GREEDY}

    async def run() -> None:
        awaited = AsyncEngine(engine)
        running = engine.submit(PROMPT, packs="a", max_tokens=32_000, **GREEDY)
        next(iter(running))
        waiting = asyncio.create_task(awaited.generate(PROMPT, packs="b", **arguments))
        endless = {**arguments, "max_tokens": 32_000}
        leaving = asyncio.create_task(awaited.generate(PROMPT, packs="b", **endless))
        await asyncio.sleep(A_MOMENT_S)
        assert (await awaited.generate(PROMPT, **arguments)).token_ids == plain
        assert not waiting.done()
        leaving.cancel()
        running.cancel()
        assert (await waiting).packs[0].id == "b"
        pieces = [piece async for piece in awaited.stream(PROMPT, packs="b", **arguments)]
        assert "".join(pieces) == (await waiting).text
        with pytest.raises(asyncio.CancelledError):
            await leaving
        n_rows = engine.stats["n_rows"]
        while engine.stats["n_running"] or engine.stats["n_waiting"]:
            await asyncio.sleep(0.001)
        # What was submitted for the task that left has been cancelled, long before its end.
        assert engine.stats["n_rows"] - n_rows < 16_000

    asyncio.run(asyncio.wait_for(run(), WAIT_S))
