"""Installs packs and what they depend on: all of them, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from modularbase.errors import InstallError, PackFormatError
from modularbase.packs.index import PackIndex, is_url
from modularbase.packs.lockfile import Lock
from modularbase.packs.manifest import Manifest, PackRequirement
from modularbase.packs.obtain import ObtainedPack, obtain, split_digest
from modularbase.packs.project import archive_path, read_manifest
from modularbase.packs.resolver import BaseVersion, resolve
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import InstalledPack, PackRecord, PackStore, write_record
from modularbase.storage.progress import InstallProgress, ProgressCallback, no_progress


def install(
    specs: Sequence[str],
    *,
    indexes: Sequence[PackIndex] = (),
    base: BaseVersion | None = None,
    progress: ProgressCallback = no_progress,
    store: PackStore | None = None,
) -> list[InstalledPack]:
    """Installs packs; those that are there stay as they are.

    Args:
        specs: Each an id, ID@VERSION, ID@SPECIFIERS, the path of an archive, of a pack file or of
            a project that has been built (with a slash), or an http(s) address of an archive or
            pack file, which may end in `#sha256=` and its digest.
        indexes: Where packs named by id are found; the first that has a version gives it.
        base: The base they must suit, where it is known.
        progress: Told what is being done.
        store: Where to; None is the user's data folder.

    Returns:
        All packs asked for and all they need, dependencies first.

    Raises:
        InvalidRequestError: A spec that is none.
        DependencyError: No set of versions goes together.
        PackIncompatibleError: A pack that is given as a file is for another base.
        PackFormatError: A file is not a sound pack.
        InstallError: A pack cannot be obtained or written, or has a wrong digest.
    """
    store = store or PackStore()
    with store.changing(progress) as stage:
        change = _Change(store, stage, indexes, base, progress)
        requirements = [change.requirement(spec) for spec in specs]
        return change.carry_out(requirements)


def install_locked(
    lock: Lock,
    *,
    indexes: Sequence[PackIndex] = (),
    base: BaseVersion | None = None,
    progress: ProgressCallback = no_progress,
    store: PackStore | None = None,
) -> list[InstalledPack]:
    """Installs exactly the packs of a lock file, from where they came from or from an index.

    Raises:
        InstallError: A pack cannot be obtained, or is not the locked one.
        DependencyError, PackIncompatibleError, PackFormatError: As for `install`.
    """
    store = store or PackStore()
    with store.changing(progress) as stage:
        change = _Change(store, stage, indexes, base, progress)
        for pack in lock.packs:
            change.give_locked(pack.id, pack.version, pack.source, pack.sha256)
        pins = [PackRequirement(id=pack.id, version=f"=={pack.version}") for pack in lock.packs]
        return change.carry_out(pins)


class _Change:
    """One change of the store, prepared in its staging folder."""

    def __init__(
        self,
        store: PackStore,
        stage: Path,
        indexes: Sequence[PackIndex],
        base: BaseVersion | None,
        progress: ProgressCallback,
    ) -> None:
        self._store = store
        self._stage = stage
        self._indexes = indexes
        self._base = base
        self._progress = progress
        self._installed = {_key(pack.manifest): pack for pack in store.packs()}
        self._obtained: dict[tuple[str, str], ObtainedPack] = {}

    def versions(self, pack_id: str) -> Sequence[Manifest]:
        """What the resolver may choose from; one manifest a version, the nearest one."""
        found: dict[str, Manifest] = {}
        for manifest in self._manifests(pack_id):
            found.setdefault(manifest.version, manifest)
        return list(found.values())

    def requirement(self, spec: str) -> PackRequirement:
        """What a spec asks for; a file is obtained now, to see what it is."""
        if not _is_location(spec):
            return parse_spec(spec)
        place, sha256 = split_digest(spec)
        obtained = self._obtain(place, sha256)
        manifest = obtained.manifest
        if self._base:
            self._base.check(manifest)
        self._obtained[_key(manifest)] = obtained
        return PackRequirement(id=manifest.id, version=f"=={manifest.version}")

    def give_locked(self, pack_id: str, version: str, source: str, sha256: str) -> None:
        """Obtains a locked pack unless it is installed."""
        installed = self._installed.get((pack_id, version))
        if installed:
            _expect(sha256, installed.record.sha256, f"{pack_id} {version}", str(installed.folder))
            return
        try:
            obtained = self._obtain(source)
        except InstallError:
            entry = self._entry(pack_id, version)
            if entry is None:
                raise
            obtained = entry
        _expect(sha256, obtained.sha256, f"{pack_id} {version}", obtained.source)
        if _key(obtained.manifest) != (pack_id, version):
            found = f"{obtained.manifest.id} {obtained.manifest.version}"
            raise PackFormatError(obtained.source, "pack", f"{pack_id} {version}", found)
        self._obtained[pack_id, version] = obtained

    def carry_out(self, requirements: Sequence[PackRequirement]) -> list[InstalledPack]:
        """Chooses versions, obtains what is missing, and installs it all at once."""
        chosen = resolve(requirements, self, self._base).packs
        missing = [manifest for manifest in chosen if self._is_missing(manifest)]
        ready = self._stage / "ready"
        ready.mkdir()
        for manifest in missing:
            self._prepare(manifest, ready)
        self._store.publish(ready, missing, self._stage)
        for manifest in chosen:
            self._progress(InstallProgress(manifest.id, "done"))
        return [self._store.read(*_key(manifest)) for manifest in chosen]

    def _manifests(self, pack_id: str) -> Iterator[Manifest]:
        yield from (o.manifest for o in self._obtained.values() if o.manifest.id == pack_id)
        yield from (p.manifest for p in self._installed.values() if p.manifest.id == pack_id)
        for index in self._indexes:
            yield from index.versions(pack_id)

    def _is_missing(self, manifest: Manifest) -> bool:
        installed = self._installed.get(_key(manifest))
        obtained = self._obtained.get(_key(manifest))
        if installed and obtained and installed.record.sha256 != obtained.sha256:
            reason = (
                f"this version is installed with another content (sha256 {installed.record.sha256},"
                f" found {obtained.sha256}): give it a version of its own, or remove the other one"
            )
            raise InstallError(reason, "digest", name=str(installed), source=obtained.source)
        return installed is None

    def _prepare(self, manifest: Manifest, ready: Path) -> None:
        obtained = self._obtained.get(_key(manifest)) or self._entry(*_key(manifest))
        assert obtained is not None  # the resolver chose it from what is there
        if obtained.manifest != manifest:
            expected = f"the manifest that the index shows for {manifest.id} {manifest.version}"
            raise PackFormatError(obtained.source, "manifest", expected, "another one")
        record = PackRecord(
            sha256=obtained.sha256,
            source=obtained.source,
            installed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            n_bytes=obtained.path.stat().st_size,
        )
        write_record(obtained.folder, record)
        target = ready / manifest.id / manifest.version
        target.parent.mkdir(exist_ok=True)
        obtained.folder.rename(target)

    def _entry(self, pack_id: str, version: str) -> ObtainedPack | None:
        for index in self._indexes:
            entry = index.entry(pack_id, version)
            if entry:
                return self._obtain(entry.location, entry.sha256)
        return None

    def _obtain(self, place: str, sha256: str | None = None) -> ObtainedPack:
        folder = self._stage / f"obtained{len(list(self._stage.iterdir()))}"
        folder.mkdir()
        if not is_url(place):
            place = str(_file(place).absolute())
        return obtain(place, folder, sha256, self._progress)


def _is_location(spec: str) -> bool:
    return is_url(spec) or os.sep in spec or spec.endswith((".mbpack", ".gguf"))


def _file(place: str) -> Path:
    path = Path(place).expanduser()
    if not path.is_dir():
        return path
    archive = archive_path(path, read_manifest(path))
    if not archive.exists():
        reason = "the project has not been built in this version; run `modularbase pack build`"
        raise InstallError(reason, "not_found", path=str(archive))
    return archive


def _key(manifest: Manifest) -> tuple[str, str]:
    return manifest.id, manifest.version


def _expect(sha256: str, found: str, name: str, source: str) -> None:
    if found != sha256:
        reason = f"it has sha256 {found}, the lock file says {sha256}"
        raise InstallError(reason, "digest", name=name, source=source)
