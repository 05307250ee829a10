"""Which generation a name points to, and until when the runtime must know it."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

from modularbase.errors import PackNotFoundError
from modularbase.packs.finder import FoundPack
from modularbase.packs.manifest import PackRequirement
from modularbase.packs.residency import Generation, Residency


class Hold:
    """Keeps generations known to the runtime until it is released, or nobody has it any more.

    The runtime leases a generation when it admits a request; before that, only a hold keeps a swap
    from retiring it.
    """

    def __init__(self, table: GenerationTable) -> None:
        """Use `GenerationTable.hold`."""
        self._table = table
        self._ids: list[int] = []

    def add(self, generation: Generation) -> None:
        """Holds a generation that the caller knows to be held, or named, by others."""
        self._table.take(generation.core_id)
        self._ids.append(generation.core_id)

    def release(self) -> None:
        """Lets go; once more is fine."""
        while self._ids:
            self._table.drop(self._ids.pop())

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class GenerationTable:
    """Names, and the generations they point to. Thread-safe.

    A generation is retired as soon as no name points to it and nobody holds it.
    """

    def __init__(self, core: Residency) -> None:
        """Args: the runtime, which is told what to retire."""
        self._core = core
        # Reentrant: the garbage collector may release a hold while its thread is in here.
        self._lock = threading.RLock()
        self._by_name: dict[str, Generation] = {}
        # For requests that want another version than the one the name points to.
        self._by_requirement: dict[str, Generation] = {}
        self._n_holds: Counter[int] = Counter()
        self._open: dict[int, Generation] = {}  # opened, and not retired yet
        self._replaced: set[int] = set()  # of these, those that only holders want any more
        self._probed: set[str] = set()  # digests that changed the base as they should
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def hold(self) -> Hold:
        """A hold on nothing yet."""
        return Hold(self)

    def find(self, requirement: PackRequirement, hold: Hold) -> Generation | None:
        """The generation that a request for a pack means, if it is known; it is held."""
        with self._lock:
            found = self._by_name.get(requirement.id)
            if found is None or not requirement.accepts(found.manifest.version):
                found = self._by_requirement.get(str(requirement))
            if found is not None:
                hold.add(found)
            return found

    def named(self, name: str, hold: Hold) -> Generation:
        """The generation a name points to; it is held.

        Raises:
            PackNotFoundError: The name is unknown.
        """
        with self._lock:
            found = self._by_name.get(name)
            if found is None:
                raise PackNotFoundError(name, "", sorted(self._by_name))
            hold.add(found)
            return found

    def known(self, name: str) -> Generation | None:
        """The generation a name points to, if there is one."""
        with self._lock:
            return self._by_name.get(name)

    def names(self) -> Mapping[str, Generation]:
        """All names."""
        with self._lock:
            return dict(self._by_name)

    def is_replaced(self, core_id: int) -> bool:
        """Whether a generation stays only until its holders let go."""
        with self._lock:
            return core_id in self._replaced

    def open(self, pack: FoundPack, hold: Hold) -> Generation:
        """Has the runtime check a file; its generation is held.

        Raises:
            PackFormatError: The file is not sound, or has another digest.
            PackIncompatibleError: It does not fit the base's shape.
        """
        manifest = pack.manifest
        with self.lock_of(manifest.id):
            generation = self._opened(pack.digest, hold)
            while generation is None:
                name = f"{manifest.id}@{manifest.version}"
                core_id = self._core.open(str(pack.path), pack.digest, name)
                generation = self._registered(core_id, pack, hold)
            return generation

    def adopt(self, read: Callable[[], tuple[int, FoundPack]], hold: Hold) -> Generation:
        """Takes in a generation that the runtime has from elsewhere than a file; it is held.

        Args:
            read: Makes it known to the runtime; returns its number there, and what it is. Called
                again when others retired the same content meanwhile.
            hold: Gets the generation.
        """
        generation = None
        while generation is None:
            generation = self._registered(*read(), hold)
        return generation

    def point(
        self, name: str, generation: Generation, check: Callable[[Generation | None], None]
    ) -> None:
        """Points a name to a generation that is held; a pin on the name goes along.

        Args:
            name: The name.
            generation: What it shall mean.
            check: Told what the name means until now; raises where that forbids the change.
        """
        with self._lock:
            old = self._by_name.get(name)
            check(old)
            self._by_name[name] = generation
            self._replaced.discard(generation.core_id)
            if old is None or old.core_id == generation.core_id:
                return
            if self._core.status_of(old.core_id).is_pinned:
                self._core.pin(generation.core_id)
                if not self._is_meant(old.core_id):
                    self._core.unpin(old.core_id)
            self._retire_unneeded(old.core_id)

    def add(self, requirement: PackRequirement, generation: Generation) -> None:
        """Makes a generation what a requirement means; a name that is known stays as it is."""
        with self._lock:
            named = self._by_name.setdefault(requirement.id, generation)
            if not requirement.accepts(named.manifest.version):
                self._by_requirement[str(requirement)] = generation
            self._replaced.discard(generation.core_id)

    def forget(self, name: str) -> None:
        """Forgets a name and all its versions."""
        with self._lock:
            versions = [key for key, g in self._by_requirement.items() if g.manifest.id == name]
            gone = [self._by_requirement.pop(key) for key in versions]
            if name in self._by_name:
                gone.append(self._by_name.pop(name))
            for generation in gone:
                self._retire_unneeded(generation.core_id)

    def lock_of(self, pack_id: str) -> threading.Lock:
        """Held by who opens or probes a pack: one at a time, and other packs do not wait."""
        with self._lock:
            return self._locks[pack_id]

    def is_probed(self, generation: Generation) -> bool:
        """Whether its content has changed the base as it should."""
        with self._lock:
            return generation.digest in self._probed

    def set_probed(self, generation: Generation) -> None:
        """Notes that its content has changed the base as it should."""
        with self._lock:
            self._probed.add(generation.digest)

    def take(self, core_id: int) -> None:
        """One hold more."""
        with self._lock:
            self._n_holds[core_id] += 1

    def drop(self, core_id: int) -> None:
        """One hold less."""
        with self._lock:
            self._n_holds[core_id] -= 1
            if self._n_holds[core_id] == 0:
                del self._n_holds[core_id]
                self._retire_unneeded(core_id)

    def _opened(self, digest: str, hold: Hold) -> Generation | None:
        with self._lock:
            found = next((g for g in self._open.values() if g.digest == digest), None)
            if found is not None:
                hold.add(found)
            return found

    def _registered(self, core_id: int, pack: FoundPack, hold: Hold) -> Generation | None:
        """None when others retired the same content since it was opened."""
        with self._lock:
            try:
                status = self._core.status_of(core_id)
            except PackNotFoundError:
                return None
            if status.is_retired:
                return None
            found = Generation(core_id, status.digest, pack.manifest, pack.path, pack.probe)
            hold.add(self._open.setdefault(core_id, found))
            return self._open[core_id]

    def _is_meant(self, core_id: int) -> bool:
        meant = [*self._by_name.values(), *self._by_requirement.values()]
        return any(generation.core_id == core_id for generation in meant)

    def _retire_unneeded(self, core_id: int) -> None:
        if core_id not in self._open or self._is_meant(core_id):
            return
        if core_id in self._n_holds:
            self._replaced.add(core_id)
            return
        del self._open[core_id]
        self._replaced.discard(core_id)
        self._core.retire(core_id)
