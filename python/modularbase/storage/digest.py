"""Copying and checking files by their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20

OnBytes = Callable[[int], None]
"""Called with the bytes done so far."""


def sha256_of(path: Path, on_bytes: OnBytes) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return _digest(file, None, on_bytes)


def copy_with_sha256(source: BinaryIO, target: Path, on_bytes: OnBytes) -> str:
    """Writes what source holds to a new file; returns its SHA-256 in hexadecimal."""
    with target.open("xb") as file:
        return _digest(source, file, on_bytes)


def _digest(source: BinaryIO, target: BinaryIO | None, on_bytes: OnBytes) -> str:
    digest = hashlib.sha256()
    n_done = 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        n_done += len(chunk)
        on_bytes(n_done)
    return digest.hexdigest()
