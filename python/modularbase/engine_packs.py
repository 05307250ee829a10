"""The packs of an engine: names and versions in front of the C++ runtime's generations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from modularbase.bases.identity import BaseIdentity
from modularbase.errors import (
    BudgetExceededError,
    DependencyError,
    InvalidRequestError,
    ModularBaseError,
    PackIncompatibleError,
    PackNotFoundError,
)
from modularbase.packs.finder import FoundPack, PackFinder
from modularbase.packs.generation_table import GenerationTable, Hold
from modularbase.packs.manifest import Manifest, PackRequirement
from modularbase.packs.probe import GENERIC_TOKENS, check_effect, check_finite
from modularbase.packs.residency import Generation, Residency, pack_status
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import PackStore
from modularbase.types import FloatArray, PackStats, PackStatus, PackUse

_WAIT_MS = 100
_MAX_PROBES_KEPT = 16

SwapMode = Literal["create", "upsert", "compare_and_swap"]


Probe = Callable[[Sequence[int], int | None], FloatArray]
"""Final hidden states [n_tokens, n_embd] of token ids, with a generation or without."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A generation that a name was pointed to.

    Attributes:
        generation: The generation.
        is_identity: Whether it changes nothing.
    """

    generation: Generation
    is_identity: bool


class EnginePacks:
    """Lists, loads, evicts, pins and swaps the packs of an engine. Safe to use from any thread.

    A name (`python_code`) points to one generation. The first use of a name takes the newest
    installed version that suits; `load` and `swap` point it elsewhere, and requests that are
    running keep what they began with.
    """

    def __init__(
        self,
        core: Residency,
        base: BaseIdentity,
        metadata_of: Callable[[Path], dict[str, object]],
        probe: Probe,
        store: PackStore | None = None,
    ) -> None:
        """Use `Engine.packs`."""
        self._core = core
        self._base = base
        self._probe = probe
        self._finder = PackFinder(base, metadata_of, store or PackStore())
        self._table = GenerationTable(core)
        # Of the base alone; most probes are on the same tokens, such as those of a pack's versions.
        self._base_states = lru_cache(_MAX_PROBES_KEPT)(lambda tokens: probe(tokens, None))

    def list(self) -> list[PackStatus]:
        """All generations that the engine knows, by name; retired ones while requests hold them."""
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name, generation in self._table.names().items():
            names[generation.core_id].append(name)
        found: list[PackStatus] = []
        for raw in self._core.status().packs:
            pack_id, _, version = raw.name.partition("@")
            is_retired = raw.is_retired or self._table.is_replaced(raw.id)
            found += [
                pack_status(name, version, raw, is_retired=is_retired)
                for name in names.get(raw.id, [pack_id])
            ]
        return sorted(found, key=lambda status: (status.id, status.is_retired, status.version))

    def status(self, name: str) -> PackStatus:
        """The generation a name points to.

        Raises:
            PackNotFoundError: The engine does not know the name.
        """
        with self._table.hold() as hold:
            return self._status(name, self._table.named(name, hold))

    def stats(self) -> PackStats:
        """Budget, bytes in use, and counters."""
        raw = self._core.status()
        counts = raw.counts
        return PackStats(
            budget_bytes=raw.budget_bytes,
            used_bytes=raw.used_bytes,
            n_loads=counts.n_loads,
            n_evictions=counts.n_evictions,
            n_failed_loads=counts.n_failed_loads,
            n_preloads=counts.n_preloads,
            n_preload_hits=counts.n_preload_hits,
            n_preload_wastes=counts.n_preload_wastes,
        )

    def load(self, pack: str, timeout_s: float = 60.0) -> PackStatus:
        """Makes a pack and what it depends on resident; the newest installed version that suits.

        Args:
            pack: "python_code", "python_code@>=1", or the path of a pack file.
            timeout_s: How long to wait for room.

        Raises:
            PackNotFoundError: It is not installed.
            PackFormatError: Its file cannot be used, or it does not do what it should.
            PackIncompatibleError: It was made for another base.
            DependencyError: What it needs is missing or in conflict.
            BudgetExceededError: There is no room for it.
        """
        deadline = time.monotonic() + timeout_s
        if _is_path(pack):
            found = self._finder.at(Path(pack))
            return self._swap(found.manifest.id, found, lambda _: None, deadline)
        requirement = parse_spec(pack)
        with self._table.hold() as hold:
            generation = self._loaded_with_dependencies(requirement, deadline, hold)
            self._table.point(requirement.id, generation, lambda _: None)
            return self._status(requirement.id, generation)

    def swap(
        self,
        name: str,
        pack: str,
        *,
        mode: SwapMode = "upsert",
        expected: str | None = None,
        timeout_s: float = 60.0,
    ) -> PackStatus:
        """Points a name to other content. Requests that run finish on the old one.

        Args:
            name: The name to point.
            pack: The path of a pack file, or a pack as in `load`.
            mode: "create": the name must be new. "compare_and_swap": it must point to `expected`.
            expected: Digest of the generation that is to be replaced.
            timeout_s: How long to wait for room.

        Raises:
            InvalidRequestError: No request could use the name, or there is no such mode.
            PackIncompatibleError: The name does not point to what it should, or as in `load`.
            ModularBaseError: As in `load`; the name then points where it did.
        """
        deadline = time.monotonic() + timeout_s
        check = _swap_check(name, mode, expected)
        check(self.known(name))  # before all the work, and again when the name changes
        if _is_path(pack):
            found = self._finder.at(Path(pack))
        else:
            found = self._finder.newest(parse_spec(pack))
        return self._swap(name, found, check, deadline)

    def evict(self, name: str) -> None:
        """Frees a pack's slot; it stays known and is loaded again when needed.

        Raises:
            PackNotFoundError: The engine does not know the name.
            BudgetExceededError: Requests use it, or it is pinned.
        """
        with self._table.hold() as hold:
            self._core.evict(self._table.named(name, hold).core_id)

    def forget(self, name: str) -> None:
        """Forgets a name; requests that have begun keep their generation."""
        self._table.forget(name)

    def pin(self, name: str, timeout_s: float = 60.0) -> None:
        """Loads a pack and keeps it resident; the pin stays with the name when it is swapped.

        Raises:
            ModularBaseError: As in `load`; it is not pinned then.
        """
        if self.known(name) is None:
            name = self.load(name, timeout_s).id
        with self._table.hold() as hold:
            generation = self._table.named(name, hold)
            self._core.pin(generation.core_id)  # first, else it might be evicted between the two
            try:
                self._load(generation, time.monotonic() + timeout_s)
            except ModularBaseError:
                self._core.unpin(generation.core_id)
                raise

    def unpin(self, name: str) -> None:
        """Lets a pack be evicted again.

        Raises:
            PackNotFoundError: The engine does not know the name.
        """
        with self._table.hold() as hold:
            self._core.unpin(self._table.named(name, hold).core_id)

    def preload(self, pack: str) -> None:
        """Loads a pack when nothing more urgent is to be done; returns at once if it is known."""
        requirement = parse_spec(pack)
        with self._table.hold() as hold:
            generation = self._table.find(requirement, hold)
            if generation is None:
                generation = self._table.open(self._finder.newest(requirement), hold)
                self._table.add(requirement, generation)
            self._core.preload(generation.core_id)

    def guess(self, name: str) -> bool:
        """Preloads a known pack that is not resident; whether there was something to do."""
        with self._table.hold() as hold:
            generation = self._table.find(parse_spec(name), hold)
            if generation is None or self._status(name, generation).state != "known":
                return False
            self._core.preload(generation.core_id)
            return True

    @property
    def base(self) -> BaseIdentity:
        """What packs must have been made for."""
        return self._base

    def publish(
        self,
        name: str,
        read: Callable[[], tuple[int, FoundPack]],
        *,
        previous: Generation | None,
        timeout_s: float = 60.0,
    ) -> Publication:
        """Points a name to a generation that does not come from a file.

        Unlike a file, it may be the identity, as a pack is before its first training step.

        Args:
            name: The name to point.
            read: As for `GenerationTable.adopt`.
            previous: What the name was pointed to by the last publication; None for the first.
            timeout_s: How long to wait for room.

        Raises:
            PackIncompatibleError: Somebody else has pointed the name elsewhere since.
            ModularBaseError: It cannot be used; the name then points where it did.
        """
        mode: SwapMode = "upsert" if previous is None else "compare_and_swap"
        check = _swap_check(name, mode, previous.digest if previous else None)
        check(self.known(name))
        with self._table.hold() as hold:
            generation = self._table.adopt(read, hold)
            self._make_resident(generation, time.monotonic() + timeout_s)
            effect = self.measure_effect(generation, GENERIC_TOKENS)
            check_finite(str(generation.path), effect)
            self._table.set_probed(generation)
            self._table.point(name, generation, check)
            return Publication(generation, is_identity=not effect.any())

    def hold(self) -> Hold:
        """What `ready` and `find` need: it keeps generations from being retired by a swap."""
        return self._table.hold()

    def ready(self, use: PackUse, deadline: float, hold: Hold) -> Generation:
        """The generation a request's pack stands for, checked and probed; its dependencies load.

        Args:
            use: The pack; a version other than the one its name points to leaves the name alone.
            deadline: Of `time.monotonic`: how long to wait for room.
            hold: Gets the generation.

        Raises:
            ModularBaseError: As in `load`.
        """
        requirement = parse_spec(use.pack)
        generation = self._table.find(requirement, hold)
        if generation is None:
            generation = self._loaded_with_dependencies(requirement, deadline, hold)
            self._table.add(requirement, generation)
            return generation
        self._want_dependencies(generation.manifest, deadline)
        if not self._table.is_probed(generation):
            self._load(generation, deadline)
        return generation

    def find(self, pack: str, hold: Hold) -> Generation | None:
        """The generation a request's pack stands for, if it is known and has been probed."""
        found = self._table.find(parse_spec(pack), hold)
        return found if found and self._table.is_probed(found) else None

    def known(self, name: str) -> Generation | None:
        """The generation a name points to, if the engine knows it."""
        return self._table.known(name)

    def manifest(self, pack: str) -> Manifest | None:
        """What a pack says of itself, if it is known or installed."""
        requirement = parse_spec(pack)
        with self._table.hold() as hold:
            found = self._table.find(requirement, hold)
        return found.manifest if found else self._finder.manifest(requirement)

    def _status(self, name: str, generation: Generation) -> PackStatus:
        raw = self._core.status_of(generation.core_id)
        return pack_status(name, generation.manifest.version, raw, is_retired=raw.is_retired)

    def _swap(
        self,
        name: str,
        found: FoundPack,
        check: Callable[[Generation | None], None],
        deadline: float,
    ) -> PackStatus:
        with self._table.hold() as hold:
            self._want_dependencies(found.manifest, deadline)
            generation = self._table.open(found, hold)
            self._load(generation, deadline)
            self._table.point(name, generation, check)
            return self._status(name, generation)

    def _loaded_with_dependencies(
        self, requirement: PackRequirement, deadline: float, hold: Hold
    ) -> Generation:
        *needed, wanted = self._finder.with_dependencies(requirement)
        for found in needed:
            exact = PackRequirement(id=found.manifest.id, version=found.manifest.version)
            dependency = self._table.find(exact, hold) or self._table.open(found, hold)
            self._load(dependency, deadline)
            self._table.add(exact, dependency)
        generation = self._table.open(wanted, hold)
        self._load(generation, deadline)
        return generation

    def _want_dependencies(self, manifest: Manifest, deadline: float) -> None:
        """Sees to it that what a known pack needs is resident, or soon will be."""
        for dependency in manifest.dependencies:
            with self._table.hold() as hold:
                known = self._table.find(dependency, hold)
                if known is not None:
                    self._core.preload(known.core_id)
                    continue
                try:
                    generation = self._loaded_with_dependencies(dependency, deadline, hold)
                except PackNotFoundError as error:
                    reason = f"{manifest.id} {manifest.version} needs {dependency}: {error}"
                    raise DependencyError(reason) from error
                self._table.add(dependency, generation)

    def _load(self, generation: Generation, deadline: float) -> None:
        self._make_resident(generation, deadline)
        with self._table.lock_of(generation.manifest.id):
            if not self._table.is_probed(generation):
                self._run_probe(generation)
                self._table.set_probed(generation)

    def _make_resident(self, generation: Generation, deadline: float) -> None:
        while not self._core.load(generation.core_id, _WAIT_MS):
            if time.monotonic() > deadline:
                stats, raw = self.stats(), self._core.status_of(generation.core_id)
                n_bytes: int = raw.n_bytes
                reason = "no room came free in time"
                raise BudgetExceededError(str(generation), n_bytes, stats.budget_bytes, reason)

    def _run_probe(self, generation: Generation) -> None:
        stored = generation.probe
        tokens = stored.tokens if stored else GENERIC_TOKENS
        try:
            effect = self.measure_effect(generation, tokens)
        except InvalidRequestError as error:  # the base has no such tokens
            name = f"{generation.manifest.id} {generation.manifest.version}"
            raise PackIncompatibleError(name, "probe", error.expected, error.found) from error
        check_effect(str(generation.path), effect, stored)

    def measure_effect(self, generation: Generation, tokens: Sequence[int]) -> FloatArray:
        """|h_pack - h_base| / |h_base| of the final hidden state at each token, [n_tokens]."""
        base = self._base_states(tuple(tokens))
        changed = self._probe(tokens, generation.core_id)
        effect: FloatArray = np.linalg.norm(changed - base, axis=1) / np.linalg.norm(base, axis=1)
        return effect


def _is_path(pack: str) -> bool:
    return pack.endswith(".gguf") or "/" in pack


def _swap_check(
    name: str, mode: SwapMode, expected: str | None
) -> Callable[[Generation | None], None]:
    """What raises when a name means something that forbids the swap."""
    if mode not in get_args(SwapMode):
        raise InvalidRequestError("mode", " or ".join(map(repr, get_args(SwapMode))), repr(mode))
    if parse_spec(name).id != name:
        raise InvalidRequestError("name", "a pack's id", repr(name))

    def check(known: Generation | None) -> None:
        found = known.digest if known else "nothing"
        if mode == "create" and known:
            raise PackIncompatibleError(name, "name", "a new one", found)
        if mode == "compare_and_swap" and found != expected:
            raise PackIncompatibleError(name, "generation", str(expected), found)

    return check
