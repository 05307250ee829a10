"""The packs of an engine: names and versions in front of the C++ runtime's generations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from modularbase.bases.identity import BaseIdentity
from modularbase.errors import (
    BaseLoadError,
    BudgetExceededError,
    PackFormatError,
    PackIncompatibleError,
    PackNotFoundError,
)
from modularbase.packs.manifest import Manifest, PackRequirement, parse_manifest
from modularbase.packs.probe import GENERIC_TOKENS, check_effect, stored_probe
from modularbase.packs.residency import Generation, Residency, pack_status
from modularbase.packs.resolver import BaseVersion, resolve
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import PackStore
from modularbase.types import FloatArray, PackStats, PackStatus, PackUse

_MANIFEST_KEY = "modularbase-pack.manifest"
_WAIT_MS = 100

SwapMode = Literal["create", "upsert", "compare_and_swap"]


Probe = Callable[[Sequence[int], int | None], FloatArray]
"""Final hidden states [n_tokens, n_embd] of token ids, with a generation or without."""


@dataclass(slots=True)
class _Table:
    """Names and the generations they point to."""

    by_name: dict[str, Generation] = field(default_factory=dict)
    probed: set[str] = field(default_factory=set)  # digests that changed the base as they should


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
        self._metadata_of = metadata_of
        self._probe = probe
        self._store = store or PackStore()
        self._changing = threading.RLock()  # one load, swap or eviction by name at a time
        self._table_lock = threading.Lock()
        self._table = _Table()

    def list(self) -> list[PackStatus]:
        """All generations that the engine knows, by name; retired ones while requests hold them."""
        with self._table_lock:
            names = {g.core_id: (name, g) for name, g in self._table.by_name.items()}
        found = []
        for raw in self._core.status().packs:
            name, generation = names.get(raw.id, (raw.name.partition("@")[0], None))
            version = generation.manifest.version if generation else raw.name.partition("@")[2]
            found.append(pack_status(name, version, raw))
        return sorted(found, key=lambda status: (status.id, status.is_retired, status.version))

    def status(self, name: str) -> PackStatus:
        """The generation a name points to.

        Raises:
            PackNotFoundError: The engine does not know the name.
        """
        generation = self._known(name)
        raw = self._core.status_of(generation.core_id)
        return pack_status(generation.manifest.id, generation.manifest.version, raw)

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
        with self._changing:
            if _is_path(pack):
                return self.swap(self._manifest_of(Path(pack)).id, pack, timeout_s=timeout_s)
            requirement = parse_spec(pack)
            self._check_known(requirement)
            for manifest in resolve([requirement], self._store, self._version).packs:
                self._point(self._open_installed(manifest), timeout_s)
        return self.status(requirement.id)

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
            PackIncompatibleError: The name does not point to what it should, or as in `load`.
            ModularBaseError: As in `load`; the name then points where it did.
        """
        with self._changing:
            self._check_swap(name, mode, expected)
            if _is_path(pack):
                generation = self._open(Path(pack), "", self._manifest_of(Path(pack)))
            else:
                generation = self._open_installed(self._store.find(parse_spec(pack)).manifest)
            self._load(generation, timeout_s)
            self._point_name(name, generation)
        return self.status(name)

    def evict(self, name: str) -> None:
        """Frees a pack's slot; it stays known and is loaded again when needed.

        Raises:
            PackNotFoundError: The engine does not know the name.
            BudgetExceededError: Requests use it, or it is pinned.
        """
        self._core.evict(self._known(name).core_id)

    def forget(self, name: str) -> None:
        """Forgets a name; requests that run keep their generation."""
        with self._changing, self._table_lock:
            generation = self._table.by_name.pop(name, None)
            others = {g.core_id for g in self._table.by_name.values()}
        if generation and generation.core_id not in others:
            self._core.retire(generation.core_id)

    def pin(self, name: str) -> None:
        """Keeps a pack resident, as soon as it is; loads it."""
        generation = self._known_or_loaded(name)
        self._core.pin(generation.core_id)
        self._load(generation, 60.0)

    def unpin(self, name: str) -> None:
        """Lets a pack be evicted again."""
        self._core.unpin(self._known(name).core_id)

    def preload(self, pack: str) -> None:
        """Loads a pack when nothing more urgent is to be done; returns at once if it is known."""
        self._core.preload(self._opened(parse_spec(pack)).core_id)

    def ready(self, use: PackUse, timeout_s: float) -> Generation:
        """The generation a request's pack stands for, checked and probed; its dependencies load.

        Raises:
            ModularBaseError: As in `load`.
        """
        requirement = parse_spec(use.pack)
        with self._table_lock:
            known = self._table.by_name.get(requirement.id)
        if known and requirement.accepts(known.manifest.version):
            for dependency in known.manifest.dependencies:
                self._core.preload(self._opened(dependency).core_id)
            if known.digest in self._table.probed:
                return known
        with self._changing:
            if not known or not requirement.accepts(known.manifest.version):
                self.load(use.pack, timeout_s)
            generation = self._known(requirement.id)
            self._load(generation, timeout_s)
            return generation

    def known(self, name: str) -> Generation | None:
        """The generation a name points to, if the engine knows it."""
        with self._table_lock:
            return self._table.by_name.get(name)

    def manifest(self, pack: str) -> Manifest | None:
        """What a pack says of itself, if it is known or installed."""
        requirement = parse_spec(pack)
        known = self.known(requirement.id)
        if known:
            return known.manifest
        try:
            return self._store.find(requirement).manifest
        except PackNotFoundError:
            return None

    def guess(self, name: str) -> bool:
        """Preloads a known pack that is not resident; whether there was something to do."""
        generation = self.known(name)
        if generation is None or self.status(name).state != "known":
            return False
        self._core.preload(generation.core_id)
        return True

    @property
    def _version(self) -> BaseVersion:
        return BaseVersion(self._base.id, self._base.version)

    def _known(self, name: str) -> Generation:
        with self._table_lock:
            generation = self._table.by_name.get(name)
            if generation is None:
                raise PackNotFoundError(name, "", sorted(self._table.by_name))
            return generation

    def _known_or_loaded(self, name: str) -> Generation:
        if self.known(name) is None:
            self.load(name)
        return self._known(name)

    def _opened(self, requirement: PackRequirement) -> Generation:
        known = self.known(requirement.id)
        if known and requirement.accepts(known.manifest.version):
            return known
        with self._changing:
            generation = self._open_installed(self._store.find(requirement).manifest)
            self._point_name(requirement.id, generation)
            return generation

    def _check_known(self, requirement: PackRequirement) -> None:
        """Tells an unknown pack, and one for other bases, from one whose dependencies fail."""
        newest = self._store.find(requirement).manifest
        suits_base = [
            manifest
            for manifest in self._store.versions(requirement.id)
            if requirement.accepts(manifest.version) and self._version.suits(manifest)
        ]
        if not suits_base:
            self._check_base(newest)

    def _open_installed(self, manifest: Manifest) -> Generation:
        self._check_base(manifest)
        pack = self._store.read(manifest.id, manifest.version)
        return self._open(pack.path, f"sha256:{pack.record.sha256}", manifest)

    def _open(self, path: Path, digest: str, manifest: Manifest) -> Generation:
        self._check_base(manifest)
        name = f"{manifest.id}@{manifest.version}"
        core_id = self._core.open(str(path), digest, name)
        return Generation(core_id, self._core.status_of(core_id).digest, manifest, path)

    def _manifest_of(self, path: Path) -> Manifest:
        try:
            text = self._metadata_of(path).get(_MANIFEST_KEY)
        except BaseLoadError as error:  # the reader's word for a file that is not sound
            raise PackFormatError(error.file, error.field, error.expected, error.found) from error
        if not isinstance(text, str):
            raise PackFormatError(str(path), _MANIFEST_KEY, "a manifest", "none")
        return parse_manifest(text, str(path))

    def _check_base(self, manifest: Manifest) -> None:
        name = f"{manifest.id} {manifest.version}"
        if manifest.base_id != self._base.id:
            raise PackIncompatibleError(name, "base_id", manifest.base_id, self._base.id)
        if not manifest.suits_base(self._base.version):
            wanted = " or ".join(manifest.base_compatibility)
            raise PackIncompatibleError(name, "base_compatibility", wanted, self._base.version)
        if manifest.base_digest and manifest.base_digest != self._base.digest:
            raise PackIncompatibleError(
                name, "base_digest", manifest.base_digest, self._base.digest
            )

    def _check_swap(self, name: str, mode: SwapMode, expected: str | None) -> None:
        known = self.known(name)
        found = known.digest if known else "nothing"
        if mode == "create" and known:
            raise PackIncompatibleError(name, "name", "a new one", found)
        if mode == "compare_and_swap" and found != expected:
            raise PackIncompatibleError(name, "generation", str(expected), found)

    def _point(self, generation: Generation, timeout_s: float) -> None:
        self._load(generation, timeout_s)
        self._point_name(generation.manifest.id, generation)

    def _point_name(self, name: str, generation: Generation) -> None:
        with self._table_lock:
            old = self._table.by_name.get(name)
            self._table.by_name[name] = generation
            still_named = old and any(
                g.core_id == old.core_id for g in self._table.by_name.values()
            )
        if old and not still_named:
            self._core.retire(old.core_id)

    def _load(self, generation: Generation, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._core.load(generation.core_id, _WAIT_MS):
            if time.monotonic() > deadline:
                stats, raw = self.stats(), self._core.status_of(generation.core_id)
                reason = f"no room came free within {timeout_s:g} s"
                n_bytes: int = raw.n_bytes
                raise BudgetExceededError(str(generation), n_bytes, stats.budget_bytes, reason)
        if generation.digest not in self._table.probed:
            self._run_probe(generation)
            self._table.probed.add(generation.digest)

    def _run_probe(self, generation: Generation) -> None:
        stored = stored_probe(self._metadata_of(generation.path))
        tokens = stored.tokens if stored else GENERIC_TOKENS
        check_effect(str(generation.path), self.measure_effect(generation, tokens), stored)

    def measure_effect(self, generation: Generation, tokens: Sequence[int]) -> FloatArray:
        """|h_pack - h_base| / |h_base| of the final hidden state at each token, [n_tokens]."""
        base = self._probe(tokens, None)
        changed = self._probe(tokens, generation.core_id)
        effect: FloatArray = np.linalg.norm(changed - base, axis=1) / np.linalg.norm(base, axis=1)
        return effect


def _is_path(pack: str) -> bool:
    return pack.endswith(".gguf") or "/" in pack
