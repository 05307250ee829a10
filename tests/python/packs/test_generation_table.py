"""Who keeps a generation of a pack known to the runtime, and how many open its file at once."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from modularbase.errors import PackNotFoundError
from modularbase.packs.finder import FoundPack
from modularbase.packs.generation_table import GenerationTable, Hold
from modularbase.packs.residency import Generation
from modularbase.packs.spec import parse_spec
from tests.python.packs.small_packs import small_manifest

WAIT_S = 20
A_MOMENT_S = 0.2


@dataclass
class FakeStatus:
    """What the runtime knows of a generation."""

    digest: str
    is_retired: bool = False
    is_pinned: bool = False
    n_leases: int = 0


@dataclass
class FakeRuntime:
    """Generations as cpp/modularbase/packs/residency.h keeps them, without weights."""

    known: dict[int, FakeStatus] = field(default_factory=dict)
    n_opened: Counter[str] = field(default_factory=Counter)
    last_id: int = 0

    def open(self, path: str, digest: str, name: str) -> int:
        self.n_opened[name] += 1
        for core_id, status in self.known.items():
            if status.digest == path:
                status.is_retired = False
                return core_id
        self.last_id += 1
        self.known[self.last_id] = FakeStatus(path)
        return self.last_id

    def retire(self, id: int) -> None:
        self.status_of(id).is_retired = True
        self._forget_if_retired(id)

    def lease(self, id: int) -> None:
        self.status_of(id).n_leases += 1

    def end_lease(self, id: int) -> None:
        self.status_of(id).n_leases -= 1
        self._forget_if_retired(id)

    def status_of(self, id: int) -> FakeStatus:
        if id not in self.known:
            raise PackNotFoundError(f"generation #{id}", "", [])
        return self.known[id]

    def pin(self, id: int) -> None:
        self.status_of(id).is_pinned = True

    def unpin(self, id: int) -> None:
        self.status_of(id).is_pinned = False

    def _forget_if_retired(self, id: int) -> None:
        if self.known[id].is_retired and self.known[id].n_leases == 0:
            del self.known[id]


def found(name: str) -> FoundPack:
    """A pack whose content is its name."""
    return FoundPack(Path(name), name, small_manifest(name), None)


def make_table(runtime: Any) -> GenerationTable:
    return GenerationTable(runtime)


NAMES = st.sampled_from(["a", "b", "alias"])
CONTENTS = st.sampled_from(["a@1.0.0", "a@2.0.0", "b@1.0.0"])


class TableMachine(RuleBasedStateMachine):
    """Names, holds and leases in any order."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.runtime = FakeRuntime()
        self.table = make_table(self.runtime)
        self.held: dict[int, Generation] = {}
        self.leased: list[int] = []

    def remember(self, hold: Hold, generation: Generation) -> Hold:
        self.held[id(hold)] = generation
        return hold

    @rule(target=holds, content=CONTENTS)
    def open(self, content: str) -> Hold:
        hold = self.table.hold()
        return self.remember(hold, self.table.open(found(content), hold))

    @rule(hold=holds, name=NAMES)
    def point(self, hold: Hold, name: str) -> None:
        self.table.point(name, self.held[id(hold)], lambda _: None)
        known = self.table.known(name)
        assert known is not None and known.core_id == self.held[id(hold)].core_id

    @rule(hold=holds, is_exact=st.booleans())
    def add(self, hold: Hold, is_exact: bool) -> None:
        generation = self.held[id(hold)]
        pack_id = generation.manifest.id
        requirement = parse_spec(str(generation) if is_exact else pack_id)
        self.table.add(requirement, generation)
        meant = self.table.find(requirement, self.table.hold())
        assert meant is not None and requirement.accepts(meant.manifest.version)

    @rule(target=holds, name=NAMES)
    def find(self, name: str) -> Any:
        hold = self.table.hold()
        generation = self.table.find(parse_spec(name), hold)
        return self.remember(hold, generation or self.table.open(found("a@1.0.0"), hold))

    @rule(hold=consumes(holds))
    def release(self, hold: Hold) -> None:
        del self.held[id(hold)]
        hold.release()
        hold.release()

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.table.forget(name)
        assert self.table.known(name) is None

    @rule(hold=holds)
    def lease(self, hold: Hold) -> None:
        self.leased.append(self.held[id(hold)].core_id)
        self.runtime.lease(self.leased[-1])

    @rule()
    def end_a_lease(self) -> None:
        if self.leased:
            self.runtime.end_lease(self.leased.pop())

    @invariant()
    def what_is_named_or_held_is_alive(self) -> None:
        for generation in [*self.table.names().values(), *self.held.values()]:
            status = self.runtime.status_of(generation.core_id)
            assert not status.is_retired
            assert status.digest == generation.digest

    @invariant()
    def nothing_else_is(self) -> None:
        wanted = {g.core_id for g in self.held.values()}
        wanted |= {g.core_id for g in self.table.names().values()}
        # What another version means may be out of sight: then its name means that version, too.
        wanted |= {g.core_id for g in self.table._by_requirement.values()}
        for core_id, status in self.runtime.known.items():
            assert status.is_retired == (core_id not in wanted)
            if status.is_retired:
                assert status.n_leases > 0


def test_a_generation_lives_as_long_as_it_is_named_or_held() -> None:
    thorough = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
    run_state_machine_as_test(TableMachine, settings=thorough)


def test_replaced_generations_are_told() -> None:
    runtime = FakeRuntime()
    table = make_table(runtime)
    with table.hold() as first:
        old = table.open(found("a@1.0.0"), first)
        assert not table.is_replaced(old.core_id)
        table.point("a", old, lambda _: None)
        with table.hold() as second:
            table.point("a", table.open(found("a@2.0.0"), second), lambda _: None)
        assert table.is_replaced(old.core_id)
        assert [status.is_retired for status in runtime.known.values()] == [False, False]
        table.point("a", old, lambda _: None)
        assert not table.is_replaced(old.core_id)
    assert [status.digest for status in runtime.known.values()] == ["a@1.0.0"]


def test_a_hold_that_nobody_has_any_more_lets_go() -> None:
    runtime = FakeRuntime()
    table = make_table(runtime)
    hold = table.hold()
    table.open(found("a@1.0.0"), hold)
    assert len(runtime.known) == 1
    del hold
    assert runtime.known == {}


@pytest.mark.parametrize("n_leases", [0, 1])
def test_content_that_others_retire_meanwhile_is_opened_again(n_leases: int) -> None:
    class Race(FakeRuntime):
        def open(self, path: str, digest: str, name: str) -> int:
            core_id = super().open(path, digest, name)
            if self.n_opened[name] == 1:
                self.known[core_id].n_leases = n_leases  # of requests that still run
                self.retire(core_id)
            return core_id

    runtime = Race()
    table = make_table(runtime)
    with table.hold() as hold:
        generation = table.open(found("a@1.0.0"), hold)
        assert runtime.n_opened["a@1.0.0"] == 2
        assert not runtime.status_of(generation.core_id).is_retired


def test_one_opens_a_pack_and_others_do_not_wait() -> None:
    class Slow(FakeRuntime):
        begun, may_end = threading.Event(), threading.Event()

        def open(self, path: str, digest: str, name: str) -> int:
            if name == "a@1.0.0":
                self.begun.set()
                assert self.may_end.wait(WAIT_S)
            return super().open(path, digest, name)

    runtime = Slow()
    table = make_table(runtime)
    with table.hold() as hold, ThreadPoolExecutor(2) as threads:
        opening = [threads.submit(table.open, found("a@1.0.0"), hold) for _ in range(2)]
        assert runtime.begun.wait(WAIT_S)
        table.point("b", table.open(found("b@1.0.0"), hold), lambda _: None)
        assert table.find(parse_spec("b"), hold) is not None
        table.forget("b")
        threading.Event().wait(A_MOMENT_S)
        assert not any(done.done() for done in opening)
        runtime.may_end.set()
        first, second = (done.result(WAIT_S) for done in opening)
        assert first is second
        assert runtime.n_opened["a@1.0.0"] == 1


@pytest.mark.parametrize("is_shared", [False, True])
def test_pins_go_along_with_a_name(is_shared: bool) -> None:
    runtime = FakeRuntime()
    table = make_table(runtime)
    with table.hold() as hold:
        old, new = table.open(found("a@1.0.0"), hold), table.open(found("a@2.0.0"), hold)
        table.point("a", old, lambda _: None)
        if is_shared:
            table.point("alias", old, lambda _: None)
        runtime.pin(old.core_id)
        table.point("a", new, lambda _: None)
        assert runtime.status_of(new.core_id).is_pinned
        assert runtime.status_of(old.core_id).is_pinned == is_shared
        table.point("a", old, lambda _: None)
        assert runtime.status_of(old.core_id).is_pinned


def test_a_check_that_raises_leaves_the_name() -> None:
    runtime = FakeRuntime()
    table = make_table(runtime)

    def refuse(known: Generation | None) -> None:
        raise PackNotFoundError(str(known), "", [])

    with table.hold() as hold:
        old, new = table.open(found("a@1.0.0"), hold), table.open(found("a@2.0.0"), hold)
        table.point("a", old, lambda _: None)
        with pytest.raises(PackNotFoundError, match=r"a@1\.0\.0"):
            table.point("a", new, refuse)
        assert table.known("a") is old
