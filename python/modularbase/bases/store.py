"""Installed bases.

- bases/NAME/: the GGUF file and base.json; appears in one rename; an imported base is NAME@VERSION
- bases/.partial/NAME/: unfinished downloads that can be resumed
- bases/.staging, bases/.locks: see storage/folder.py
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from packaging.version import InvalidVersion, Version

from modularbase.errors import InstallError
from modularbase.storage.disk import data_folder, disk_errors
from modularbase.storage.files import flush_tree
from modularbase.storage.folder import SharedFolder, replace_folder

_RECORD = "base.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """What is kept about an installed base, in base.json.

    Attributes:
        name: Name in the catalogue, or NAME@VERSION of an imported base.
        source: Where it came from.
        revision: Commit of a hub repository, or None.
        sha256: Digest of the GGUF file.
        licence: SPDX identifier.
        filename: The GGUF file beside the record.
        n_bytes: Its size.
        installed_at: UTC time, ISO 8601.
        family: Architecture of an imported base; the catalogue knows the others'.
    """

    name: str
    source: str
    revision: str | None
    sha256: str
    licence: str
    filename: str
    n_bytes: int
    installed_at: str
    family: str | None = None


class BaseStore(SharedFolder):
    """Installed bases below one folder. Processes may share it."""

    def __init__(self, root: Path | None = None) -> None:
        """Uses root, or the user's data folder; nothing is created before it is needed."""
        super().__init__((root or data_folder()) / "bases")

    def folder(self, name: str) -> Path:
        """Where an installed base lies."""
        return self.root / name

    def imported_names(self) -> list[str]:
        """Names of the bases that were imported, the oldest version of each first."""
        if not self.root.is_dir():
            return []
        names = [path.name for path in self.root.iterdir() if "@" in path.name]
        return sorted(names, key=_name_and_version)

    def partial_folder(self, name: str) -> Path:
        """Where a base's unfinished downloads are kept."""
        return self.root / ".partial" / name

    def record(self, name: str) -> BaseRecord | None:
        """What is installed under a name, or None.

        Raises:
            InstallError: The installation is damaged.
        """
        folder = self.folder(name)
        try:
            raw = dict(json.loads((folder / _RECORD).read_text(encoding="utf-8")))
            known = {field.name for field in fields(BaseRecord)}
            record = BaseRecord(**{key: raw[key] for key in raw.keys() & known})
            n_bytes = (folder / record.filename).stat().st_size
        except FileNotFoundError:
            if not folder.exists():
                return None
            raise _damaged(name, folder, "a file is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(name, folder, f"unreadable record: {error}") from error
        if n_bytes != record.n_bytes:
            raise _damaged(name, folder, f"{n_bytes} bytes instead of {record.n_bytes}")
        return record

    def publish(self, gguf: Path, record: BaseRecord, stage: Path) -> None:
        """Makes a complete GGUF file the installed base, all at once; `stage` is its staging."""
        folder, ready = self.folder(record.name), stage / "ready"
        with disk_errors(record.name, folder):
            ready.mkdir()
            gguf.replace(ready / record.filename)
            text = json.dumps(asdict(record), indent=2) + "\n"
            (ready / _RECORD).write_text(text, encoding="utf-8")
            flush_tree(ready)
            # What is there is damaged, else it would not be installed anew.
            replace_folder(ready, folder, stage / "old")

    def discard(self, name: str) -> None:
        """Deletes a base and its unfinished downloads; the caller holds the lock."""
        folder, partial = self.folder(name), self.partial_folder(name)
        with self.staging(name) as stage, disk_errors(name, folder):
            if folder.exists():
                folder.rename(stage / "old")  # at once, even if deleting is cut short
            if partial.exists():
                partial.rename(stage / "partial")


def _name_and_version(imported: str) -> tuple[str, Version]:
    name, _, version = imported.partition("@")
    try:
        return name, Version(version)
    except InvalidVersion:  # a folder that somebody else made
        return name, Version("0")


def _damaged(name: str, folder: Path, why: str) -> InstallError:
    reason = f"the installation is damaged ({why}); install it again"
    return InstallError(reason, "broken", name=name, path=str(folder))
