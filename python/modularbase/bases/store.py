"""The user's data folder: installed bases, downloads under way, and locks.

- bases/NAME/: the GGUF file and base.json; appears in one rename
- bases/.partial/NAME/: unfinished downloads that can be resumed
- bases/.staging/NAME/: work in progress, worthless after a crash
- bases/.locks/NAME: held while a base is installed or removed
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import platformdirs

from modularbase.bases.progress import InstallProgress, ProgressCallback
from modularbase.errors import InstallError

HOME_VARIABLE = "MODULARBASE_HOME"

_RECORD = "base.json"
_LOCK_POLL_S = 0.1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """What is kept about an installed base, in base.json.

    Attributes:
        name: Name in the catalogue.
        source: Where it came from.
        revision: Commit of a hub repository, or None.
        sha256: Digest of the GGUF file.
        licence: SPDX identifier.
        filename: The GGUF file beside the record.
        n_bytes: Its size.
        installed_at: UTC time, ISO 8601.
    """

    name: str
    source: str
    revision: str | None
    sha256: str
    licence: str
    filename: str
    n_bytes: int
    installed_at: str


def data_folder() -> Path:
    """The folder all data lies in: $MODULARBASE_HOME, else the platform's place for user data."""
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).expanduser() if home else platformdirs.user_data_path("modularbase")


@contextlib.contextmanager
def disk_errors(base: str, path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into an InstallError that says what to do."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        if error.errno in _FULL:
            reason = f"the disk is full ({error.strerror}); free some space and try again"
            raise InstallError(reason, "disk_full", base=base, path=place) from error
        reason = f"cannot write there ({error.strerror}); {HOME_VARIABLE} names another folder"
        raise InstallError(reason, "unwritable", base=base, path=place) from error


class BaseStore:
    """Installed bases below one folder. Processes may share it."""

    def __init__(self, root: Path | None = None) -> None:
        """Uses root, or the user's data folder; nothing is created before it is needed."""
        self.root = (root or data_folder()) / "bases"

    def folder(self, name: str) -> Path:
        """Where an installed base lies."""
        return self.root / name

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
            raw = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            record = BaseRecord(**{field.name: raw[field.name] for field in fields(BaseRecord)})
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

    @contextlib.contextmanager
    def lock(self, name: str, progress: ProgressCallback) -> Iterator[None]:
        """Keeps other processes from changing this base; a crash releases it."""
        path = self.root / ".locks" / name
        with disk_errors(name, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        with file:
            while not _try_lock(file.fileno()):
                progress(InstallProgress(name, "wait"))
                time.sleep(_LOCK_POLL_S)
            yield

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """An empty folder on the same disk, gone afterwards; the caller holds the lock."""
        folder = self.root / ".staging" / name
        with disk_errors(name, folder):
            if folder.exists():  # of a process that was killed
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, gguf: Path, record: BaseRecord, stage: Path) -> None:
        """Makes a complete GGUF file the installed base, all at once; `stage` is its staging."""
        folder, ready = self.folder(record.name), stage / "ready"
        with disk_errors(record.name, folder):
            ready.mkdir()
            gguf.replace(ready / record.filename)
            text = json.dumps(asdict(record), indent=2) + "\n"
            (ready / _RECORD).write_text(text, encoding="utf-8")
            for path in (ready / record.filename, ready / _RECORD, ready):
                _flush_to_disk(path)
            if folder.exists():  # damaged, else it would not be installed anew
                folder.rename(stage / "old")
            ready.rename(folder)
            _flush_to_disk(folder.parent)

    def discard(self, name: str) -> None:
        """Deletes a base and its unfinished downloads; the caller holds the lock."""
        folder, partial = self.folder(name), self.partial_folder(name)
        with self.staging(name) as stage, disk_errors(name, folder):
            if folder.exists():
                folder.rename(stage / "old")  # at once, even if deleting is cut short
            if partial.exists():
                partial.rename(stage / "partial")


def _damaged(name: str, folder: Path, why: str) -> InstallError:
    reason = f"the installation is damaged ({why}); install it again"
    return InstallError(reason, "broken", base=name, path=str(folder))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
