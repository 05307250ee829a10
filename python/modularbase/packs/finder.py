"""Pack files that suit one base: installed ones, and those that a path names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modularbase.errors import (
    BaseLoadError,
    PackFormatError,
    PackIncompatibleError,
    PackNotFoundError,
)
from modularbase.packs import router_file
from modularbase.packs.manifest import Manifest, PackRequirement, parse_manifest
from modularbase.packs.probe import stored_probe
from modularbase.packs.resolver import BaseVersion, resolve
from modularbase.packs.store import PackStore
from modularbase.packs.weights import Probe

_MANIFEST_KEY = "modularbase-pack.manifest"
_ARCHITECTURE = "general.architecture"


class Base(Protocol):
    """What packs say about the base they were made for."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def version(self) -> str:
        """Its version."""

    @property
    def digest(self) -> str:
        """Of its file."""


@dataclass(frozen=True, slots=True)
class FoundPack:
    """A pack file whose manifest suits the base; the rest of it is unread.

    Attributes:
        path: The file.
        digest: What its content must have, or "" where nobody has recorded it.
        manifest: What it says of itself.
        probe: What it should do to the base, where it says so.
    """

    path: Path
    digest: str
    manifest: Manifest
    probe: Probe | None


class PackFinder:
    """Finds packs for one base."""

    def __init__(
        self,
        base: Base,
        metadata_of: Callable[[Path], Mapping[str, object]],
        store: PackStore,
    ) -> None:
        """Args: the base; a reader of GGUF metadata; what is installed."""
        self._base = base
        self._metadata_of = metadata_of
        self._store = store

    def at(self, path: Path) -> FoundPack:
        """The pack in a file.

        Raises:
            PackFormatError: The file is not sound, or has no manifest.
            PackIncompatibleError: It was made for another base, or is no domain pack.
        """
        metadata = self._metadata(path)
        if metadata.get(_ARCHITECTURE) == router_file.ARCHITECTURE:
            self._check_suits(router_file.read_router(path).manifest)
        text = metadata.get(_MANIFEST_KEY)
        if not isinstance(text, str):
            raise PackFormatError(str(path), _MANIFEST_KEY, "a manifest", "none")
        manifest = parse_manifest(text, str(path))
        self._check_suits(manifest)
        return FoundPack(path, "", manifest, stored_probe(metadata))

    def newest(self, requirement: PackRequirement) -> FoundPack:
        """The newest installed version.

        Raises:
            PackNotFoundError: None is installed.
            InstallError: What is installed is damaged.
            PackFormatError, PackIncompatibleError: As for `at`.
        """
        return self._installed(self._newest(requirement))

    def with_dependencies(self, requirement: PackRequirement) -> Sequence[FoundPack]:
        """The newest installed version that goes with what it needs, which comes before it.

        Raises:
            PackNotFoundError: None is installed.
            InstallError: What is installed is damaged.
            DependencyError: What it needs is missing or in conflict.
            PackFormatError, PackIncompatibleError: As for `at`.
        """
        self._check_any_suits(requirement)
        base = BaseVersion(self._base.id, self._base.version)
        packs = resolve([requirement], self._store, base).packs
        return [self._installed(manifest) for manifest in packs]

    def manifest(self, requirement: PackRequirement) -> Manifest | None:
        """What the newest installed version says of itself."""
        try:
            return self._store.find(requirement).manifest
        except PackNotFoundError:
            return None

    def _check_any_suits(self, requirement: PackRequirement) -> None:
        """Tells an unknown pack, and one for other bases, from one whose dependencies fail."""
        newest = self._newest(requirement)
        base = BaseVersion(self._base.id, self._base.version)
        versions = self._store.versions(requirement.id)
        if not any(requirement.accepts(m.version) and base.suits(m) for m in versions):
            self._check_suits(newest)

    def _newest(self, requirement: PackRequirement) -> Manifest:
        try:
            return self._store.find(requirement).manifest
        except PackNotFoundError:
            for pack_id, version in self._store.names():
                if pack_id == requirement.id and requirement.accepts(version):
                    self._store.read(pack_id, version)  # says what is wrong with it
            raise

    def _installed(self, manifest: Manifest) -> FoundPack:
        pack = self._store.read(manifest.id, manifest.version)
        self._check_suits(manifest)
        probe = stored_probe(self._metadata(pack.path))
        return FoundPack(pack.path, f"sha256:{pack.record.sha256}", manifest, probe)

    def _metadata(self, path: Path) -> Mapping[str, object]:
        try:
            return self._metadata_of(path)
        except BaseLoadError as error:  # the reader's word for a file that is not sound
            raise PackFormatError(error.file, error.field, error.expected, error.found) from error

    def _check_suits(self, manifest: Manifest) -> None:
        name = f"{manifest.id} {manifest.version}"
        if manifest.type != "domain":
            raise PackIncompatibleError(name, "type", "domain, to answer requests", manifest.type)
        if manifest.base_id != self._base.id:
            raise PackIncompatibleError(name, "base_id", manifest.base_id, self._base.id)
        if not manifest.suits_base(self._base.version):
            wanted = " or ".join(manifest.base_compatibility)
            raise PackIncompatibleError(name, "base_compatibility", wanted, self._base.version)
        if manifest.base_digest and manifest.base_digest != self._base.digest:
            raise PackIncompatibleError(
                name, "base_digest", manifest.base_digest, self._base.digest
            )
