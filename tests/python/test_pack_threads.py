"""Packs that many threads load, swap, forget and use at once; and what that leaves behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine
from modularbase.errors import PackFormatError, PackIncompatibleError
from tests.python.conftest import PackEngineFactory
from tests.tools.engine_packs import (
    GREEDY,
    PROMPT,
    WAIT_S,
    answer,
    eventually,
    install_pack,
    leased,
    never,
    pack_file,
    tokens,
)


def together(n: int, work: Callable[[int], Any]) -> list[Any]:
    """What n threads return that begin at the same time."""
    barrier = threading.Barrier(n)

    def begin(i: int) -> Any:
        barrier.wait(WAIT_S)
        return work(i)

    with ThreadPoolExecutor(n) as threads:
        return [done.result(WAIT_S) for done in [threads.submit(begin, i) for i in range(n)]]


@pytest.mark.parametrize("call", ["load", "answer"])
def test_a_new_pack_is_loaded_and_tried_once(
    call: str, pack_engine: Engine, tmp_path: Path
) -> None:
    install_pack(tmp_path)
    n_threads = 8
    if call == "load":
        found = together(n_threads, lambda _: pack_engine.packs.load("code").digest)
    else:
        found = together(n_threads, lambda _: tuple(tokens(pack_engine, "code")))
    assert len(set(found)) == 1
    status = pack_engine.packs.status("code")
    assert status.n_loads == pack_engine.packs.stats().n_loads == 1
    n_requests = n_threads if call == "answer" else 0
    assert status.n_hits == 1 + n_requests  # one probe


def test_new_packs_beside_each_other(pack_engine: Engine, tmp_path: Path) -> None:
    names = [f"pack{i}" for i in range(6)]
    for name in names:
        install_pack(tmp_path, name)
    found = together(12, lambda i: tuple(tokens(pack_engine, names[i % 6])))
    assert found[:6] == found[6:] == [tuple(tokens(pack_engine, name)) for name in names]
    assert pack_engine.packs.stats().n_loads == 6


def test_results_under_swaps_come_from_one_generation_each(
    pack_engine: Engine, tmp_path: Path
) -> None:
    files = [str(pack_file(tmp_path, f"code@{i}.0.0")) for i in range(2)]
    alone: dict[str, list[int]] = {}
    for file in files:
        digest = pack_engine.packs.swap("code", file).digest
        alone[digest] = tokens(pack_engine, "code", max_tokens=48)
    done = threading.Event()

    def swap() -> int:
        n_swaps = 0
        while not done.is_set():
            pack_engine.packs.swap("code", files[n_swaps % 2])
            n_swaps += 1
        return n_swaps

    def generate(_: int) -> set[str]:
        seen = set()
        for _ in range(60):
            result = answer(pack_engine, never("code"), max_tokens=48)
            (used,) = result.packs
            assert result.token_ids == alone[used.digest]
            seen.add(used.digest)
        return seen

    with ThreadPoolExecutor(1) as threads:
        swapping = threads.submit(swap)
        try:
            seen: set[str] = set().union(*together(4, generate))
        finally:
            done.set()
        assert swapping.result(WAIT_S) > 10
    assert seen == set(alone)
    (status,) = pack_engine.packs.list()
    assert (status.n_leases, status.is_retired) == (0, False)
    assert pack_engine.packs.stats().used_bytes == status.n_bytes


def test_a_request_that_waits_its_turn_keeps_what_its_name_meant(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    engine = pack_engines(n_sequences=1)
    files = [str(pack_file(tmp_path, f"code@{i}.0.0")) for i in range(2)]
    new, old = (engine.packs.swap("code", file).digest for file in reversed(files))
    expected = tokens(engine, "code")
    with leased(engine, None):  # the only one that may run
        waiting, cancelled, dropped = (
            engine.submit(PROMPT, packs=never("code"), max_tokens=16, **GREEDY) for _ in range(3)
        )
        assert engine.packs.swap("code", files[1]).digest == new
        listed = [(status.digest, status.is_retired) for status in engine.packs.list()]
        assert listed == [(new, False), (old, True)]
    result = waiting.result(WAIT_S)
    assert (result.packs[0].digest, result.token_ids) == (old, expected)
    cancelled.cancel()
    del dropped  # it runs all the same
    eventually(lambda: [status.digest for status in engine.packs.list()] == [new])


def test_only_one_of_many_compares_and_swaps(pack_engine: Engine, tmp_path: Path) -> None:
    first = pack_engine.packs.load(str(pack_file(tmp_path))).digest
    files = [str(pack_file(tmp_path, f"code@2.0.{i}")) for i in range(8)]

    def swap(i: int) -> str | None:
        mode: Any = "compare_and_swap"
        try:
            return pack_engine.packs.swap("code", files[i], mode=mode, expected=first).digest
        except PackIncompatibleError as error:
            assert error.field == "generation"
            return None

    (winner,) = [digest for digest in together(8, swap) if digest]
    assert [status.digest for status in pack_engine.packs.list()] == [winner]
    assert pack_engine.packs.stats().used_bytes == pack_engine.packs.status("code").n_bytes


def test_only_one_of_many_creates(pack_engine: Engine, tmp_path: Path) -> None:
    files = [str(pack_file(tmp_path, f"code@2.0.{i}")) for i in range(8)]

    def create(i: int) -> bool:
        try:
            pack_engine.packs.swap("new", files[i], mode="create")
            return True
        except PackIncompatibleError:
            return False

    assert sum(together(8, create)) == 1
    assert len(pack_engine.packs.list()) == 1


def test_names_come_and_go_under_load(pack_engine: Engine, tmp_path: Path) -> None:
    """Forgetting, pinning, evicting and asking what is there never break a request."""
    for name in ("a", "b"):
        install_pack(tmp_path, name)
    alone = {name: tokens(pack_engine, name) for name in ("a", "b")}

    def work(i: int) -> None:
        for turn in range(40):
            name = "ab"[turn % 2]
            if i < 4:
                result = answer(pack_engine, never(name))
                assert result.token_ids == alone[name]
            elif i == 4:
                pack_engine.packs.forget(name)
            elif i == 5:
                pack_engine.packs.preload(name)
            elif i == 6:
                pack_engine.packs.load(name)
            else:
                listed = pack_engine.packs.list()
                assert all(status.n_leases >= 0 for status in listed)

    together(8, work)
    assert all(status.n_leases == 0 for status in pack_engine.packs.list())


def resident_bytes() -> int:
    """Memory of this process."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("way", ["evict", "swap", "forget"])
def test_many_loads_leave_nothing(
    way: str, pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    # Else every generation's prompts touch more of the KV cache, whose memory is there from the
    # start but counts only then.
    engine = pack_engines(prefix_cache="off")
    files = [str(pack_file(tmp_path, f"code@{i}.0.0")) for i in range(2)]
    turns = itertools.count()

    def cycle() -> None:
        if way == "evict":
            engine.packs.pin("code")
            engine.packs.unpin("code")
        else:
            engine.packs.load(files[next(turns) % 2])
        tokens(engine, "code", max_tokens=2)
        if way != "swap":
            getattr(engine.packs, way)("code")

    engine.packs.load(files[0])
    for _ in range(50):
        cycle()
    n_bytes, n_files, n_loads = resident_bytes(), open_files(), engine.packs.stats().n_loads
    for _ in range(200):
        cycle()
    assert engine.packs.stats().n_loads == n_loads + 200
    assert open_files() == n_files
    # A slot or a file kept by each cycle would be 130 MB; 0.1 MB is seen.
    assert resident_bytes() - n_bytes < 4 << 20
    assert len(engine.packs.list()) <= 1


def test_a_pack_without_effect_is_refused_however_busy_the_engine_is(
    pack_engines: PackEngineFactory, tmp_path: Path
) -> None:
    """The base and the pack are tried in steps of other sizes, which may round in other ways."""
    engine = pack_engines(n_batch=512)
    path = str(pack_file(tmp_path, strength=0.0))
    done = threading.Event()

    def come_and_go() -> None:
        for turn in itertools.count():
            tokens(engine, max_tokens=1 + turn % 5)
            if done.wait(0.001 * (turn % 3)):
                return

    with ThreadPoolExecutor(1) as threads:
        coming = threads.submit(come_and_go)
        try:
            for _ in range(100):
                with pytest.raises(PackFormatError, match="no effect at all"):
                    engine.packs.load(path)
        finally:
            done.set()
        coming.result(WAIT_S)
