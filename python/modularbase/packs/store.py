"""Installed packs.

- packs/ID/VERSION/: pack.gguf, manifest.json, README.md, maybe LICENSE, and record.json; appears
  in one rename and never changes, so a version has one content
- packs/.staging/packs/commit/ID/VERSION/: verified packs on their way there; a process that is
  killed between two renames leaves them to the next one, which finishes the change
- packs/.locks: see storage/folder.py
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from packaging.version import Version

from modularbase.errors import DependencyError, InstallError, PackFormatError, PackNotFoundError
from modularbase.packs.archive import GGUF, MANIFEST
from modularbase.packs.manifest import Manifest, PackRequirement, is_version, parse_manifest
from modularbase.packs.resolver import preference
from modularbase.storage.disk import data_folder, disk_errors
from modularbase.storage.files import flush_to_disk, flush_tree
from modularbase.storage.folder import SharedFolder, replace_folder
from modularbase.storage.progress import ProgressCallback, no_progress

_RECORD = "record.json"
_CHANGES = "packs"  # one change of the store at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PackRecord:
    """What is kept about an installed pack, in record.json.

    Attributes:
        sha256: Digest of pack.gguf.
        source: Path or URL it came from.
        installed_at: UTC time, ISO 8601.
        n_bytes: Size of pack.gguf.
    """

    sha256: str
    source: str
    installed_at: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class InstalledPack:
    """A pack in the store."""

    manifest: Manifest
    record: PackRecord
    folder: Path

    @property
    def path(self) -> Path:
        """The pack file."""
        return self.folder / GGUF

    def __str__(self) -> str:
        return f"{self.manifest.id} {self.manifest.version}"


class PackStore(SharedFolder):
    """Installed packs below one folder. Processes may share it."""

    def __init__(self, root: Path | None = None) -> None:
        """Uses root, or the user's data folder; nothing is created before it is needed."""
        super().__init__((root or data_folder()) / "packs")

    def folder(self, pack_id: str, version: str) -> Path:
        """Where an installed pack lies."""
        return self.root / pack_id / version

    def names(self) -> list[tuple[str, str]]:
        """Ids and versions of all that is installed, sound or not."""
        return [
            (pack_id, version)
            for pack_id in _folders(self.root)
            if not pack_id.startswith(".")
            for version in _folders(self.root / pack_id)
            if is_version(version)
        ]

    def read(self, pack_id: str, version: str) -> InstalledPack:
        """One installed pack.

        Raises:
            InstallError: It is not installed, or damaged.
        """
        folder, name = self.folder(pack_id, version), f"{pack_id} {version}"
        if not folder.exists():
            raise InstallError("it is not installed", "not_installed", name=name)
        try:
            raw = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            record = PackRecord(**{field.name: raw[field.name] for field in fields(PackRecord)})
            manifest = parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
            n_bytes = (folder / GGUF).stat().st_size
        except (OSError, ValueError, KeyError, TypeError, PackFormatError) as error:
            raise damaged(name, folder, str(error)) from error
        if (manifest.id, manifest.version) != (pack_id, version):
            raise damaged(name, folder, f"it says that it is {manifest.id} {manifest.version}")
        if n_bytes != record.n_bytes:
            raise damaged(name, folder, f"{n_bytes} bytes instead of {record.n_bytes}")
        return InstalledPack(manifest, record, folder)

    def packs(self) -> list[InstalledPack]:
        """All installed packs that are sound, by id, the oldest version first."""
        found = []
        for pack_id, version in self.names():
            with contextlib.suppress(InstallError):  # `names` and `read` tell of damaged ones
                found.append(self.read(pack_id, version))
        return sorted(found, key=lambda p: (p.manifest.id, Version(p.manifest.version)))

    def versions(self, pack_id: str) -> Sequence[Manifest]:
        """All installed versions of a pack: the store is a `PackSource`."""
        return [pack.manifest for pack in self.packs() if pack.manifest.id == pack_id]

    def find(self, requirement: PackRequirement) -> InstalledPack:
        """The newest installed version that suits; a pre-release only where no release does.

        Raises:
            PackNotFoundError: None does.
        """
        packs = self.packs()
        suitable = [
            pack
            for pack in packs
            if _is_wanted((pack.manifest.id, pack.manifest.version), requirement)
        ]
        if not suitable:
            known = [str(pack) for pack in packs]
            raise PackNotFoundError(requirement.id, requirement.version, known)
        return max(suitable, key=lambda pack: preference(pack.manifest))

    @contextlib.contextmanager
    def changing(self, progress: ProgressCallback = no_progress) -> Iterator[Path]:
        """Holds the store's lock; gives a folder for work in progress.

        Raises:
            InstallError: The data folder cannot be written.
        """
        with self.lock(_CHANGES, progress):
            self._finish_killed_change()
            with self.staging(_CHANGES) as stage, disk_errors("packs", self.root):
                yield stage

    def publish(self, ready: Path, order: Sequence[Manifest], stage: Path) -> None:
        """Installs prepared packs: all of them, or none; the caller is `changing`.

        Args:
            ready: Holds ID/VERSION/ of each, below `stage`; `write_record` has been called.
            order: What it holds, dependencies first.
            stage: The folder of `changing`.
        """
        flush_tree(ready)
        commit = stage / "commit"
        ready.rename(commit)
        flush_to_disk(stage)
        moved: list[Path] = []
        try:
            for manifest in order:
                self._move_in(commit / manifest.id / manifest.version, manifest.id, stage)
                moved.append(self.folder(manifest.id, manifest.version))
        except BaseException:  # also when interrupted
            for i, folder in enumerate(moved):
                folder.rename(stage / f"undone{i}")
            raise

    def remove(self, requirement: PackRequirement) -> list[str]:
        """Removes all installed versions that suit, sound or not; returns their names.

        Raises:
            PackNotFoundError: None does.
            DependencyError: Packs that stay need them.
            InstallError: The data folder cannot be written.
        """
        with self.changing() as stage:
            doomed = self._suitable(requirement)
            self._refuse_needed(doomed)
            return self._discard(doomed, stage)

    def remove_needed(self, requirement: PackRequirement) -> list[str]:
        """Removes as `remove` does, though other packs may need what goes."""
        with self.changing() as stage:
            return self._discard(self._suitable(requirement), stage)

    def _suitable(self, requirement: PackRequirement) -> list[tuple[str, str]]:
        names = self.names()
        found = [name for name in names if _is_wanted(name, requirement)]
        if not found:
            known = [" ".join(name) for name in names]
            raise PackNotFoundError(requirement.id, requirement.version, known)
        return found

    def _refuse_needed(self, doomed: Sequence[tuple[str, str]]) -> None:
        staying = [name for name in self.names() if name not in doomed]
        needs = [
            f"{pack} needs {dependency}"
            for pack in self.packs()
            if (pack.manifest.id, pack.manifest.version) in staying
            for dependency in pack.manifest.dependencies
            if any(_is_wanted(name, dependency) for name in doomed)
            and not any(_is_wanted(name, dependency) for name in staying)
        ]
        if needs:
            names = ", ".join(" ".join(name) for name in doomed)
            raise DependencyError(f"cannot remove {names}: {'; '.join(needs)}")

    def _discard(self, doomed: Sequence[tuple[str, str]], stage: Path) -> list[str]:
        for i, name in enumerate(doomed):
            folder = self.folder(*name)
            folder.rename(stage / f"old{i}")  # at once, even if deleting is cut short
            with contextlib.suppress(OSError):  # other versions are still there
                folder.parent.rmdir()
        return [" ".join(name) for name in doomed]

    def _move_in(self, ready: Path, pack_id: str, stage: Path) -> None:
        folder = self.folder(pack_id, ready.name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        flush_to_disk(self.root)
        # What is there is damaged, else it would not be installed anew.
        replace_folder(ready, folder, stage / f"old-{pack_id}-{ready.name}")

    def _finish_killed_change(self) -> None:
        stage = self.root / ".staging" / _CHANGES
        with disk_errors("packs", stage):
            for ready in sorted((stage / "commit").glob("*/*")):
                self._move_in(ready, ready.parent.name, stage)


def write_record(folder: Path, record: PackRecord) -> None:
    """Adds record.json to a pack's folder."""
    text = json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n"
    (folder / _RECORD).write_text(text, encoding="utf-8")


def damaged(name: str, folder: Path, why: str) -> InstallError:
    """The error of an installed pack that is not what was installed."""
    reason = f"the installation is damaged ({why}); remove it and install it again"
    return InstallError(reason, "broken", name=name, path=str(folder))


def _is_wanted(name: tuple[str, str], requirement: PackRequirement) -> bool:
    pack_id, version = name
    return pack_id == requirement.id and requirement.accepts(version)


def _folders(parent: Path) -> list[str]:
    try:
        return sorted(path.name for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:  # nothing installed yet, or just removed
        return []
