"""Files that are there complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from modularbase.storage.disk import disk_errors


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or the list of a folder's files, is safe from a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flushes a folder and all below it."""
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path beside `path`; the file written there takes its place once it is on the disk.

    Raises:
        InstallError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with disk_errors(path.name, path):
        try:
            yield part
            flush_to_disk(part)
            part.replace(path)
            flush_to_disk(path.parent)
        finally:
            part.unlink(missing_ok=True)
