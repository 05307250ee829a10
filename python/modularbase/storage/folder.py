"""A folder that processes share: locks, work in progress, and changes that appear all at once.

- NAME/: what is installed; appears in one rename
- .staging/NAME/: work in progress, worthless after a crash
- .locks/NAME: held while something is installed or removed
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from modularbase.storage.disk import disk_errors
from modularbase.storage.files import flush_to_disk
from modularbase.storage.progress import InstallProgress, ProgressCallback

_LOCK_POLL_S = 0.1


class SharedFolder:
    """Installed things below one folder. Processes may share it."""

    def __init__(self, root: Path) -> None:
        """Nothing is created before it is needed."""
        self.root = root

    @contextlib.contextmanager
    def lock(self, name: str, progress: ProgressCallback) -> Iterator[None]:
        """Keeps other processes from changing what has this name; a crash releases it."""
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


def replace_folder(ready: Path, folder: Path, old: Path) -> None:
    """Renames a flushed folder to where it belongs; what lies there goes to `old` first."""
    if folder.exists():
        folder.rename(old)
    ready.rename(folder)
    flush_to_disk(folder.parent)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
