"""modularbase-packs.lock: exactly which packs a piece of work uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modularbase.errors import PackFormatError
from modularbase.packs.manifest import PackId, PackRequirement, PackVersion, parse_model
from modularbase.packs.resolver import BaseVersion, resolve
from modularbase.packs.store import PackStore
from modularbase.storage.files import appearing

LOCK_FILE = "modularbase-packs.lock"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedPack(_Part):
    """One pack; `sha256` is the digest of its pack.gguf, wherever it comes from."""

    id: PackId
    version: PackVersion
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    source: str
    needed_by: tuple[PackId, ...] = ()


class Lock(_Part):
    """A lock file; dependencies come before the packs that need them."""

    lock_version: Literal[1] = 1
    packs: tuple[LockedPack, ...] = ()


def lock_installed(
    requirements: Sequence[PackRequirement], base: BaseVersion | None, store: PackStore
) -> Lock:
    """Pins installed packs and what they need; without requirements, all installed packs.

    Raises:
        DependencyError: A pack is not installed, or they do not go together.
    """
    wanted = requirements or [PackRequirement(id=pack_id) for pack_id in dict(store.names())]
    resolution = resolve(wanted, store, base)
    packs = []
    for manifest in resolution.packs:
        record = store.read(manifest.id, manifest.version).record
        packs.append(
            LockedPack(
                id=manifest.id,
                version=manifest.version,
                sha256=record.sha256,
                source=record.source,
                needed_by=resolution.needed_by[manifest.id],
            )
        )
    return Lock(packs=tuple(packs))


def write_lock(path: Path, lock: Lock) -> None:
    """Writes a lock file, all at once.

    Raises:
        InstallError: It cannot be written.
    """
    with appearing(path) as part:
        part.write_text(lock.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_lock(path: Path) -> Lock:
    """Reads a lock file.

    Raises:
        PackFormatError: There is none, or it is not sound.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise PackFormatError(str(path), "file", "a lock file", found) from error
    lock = parse_model(Lock, text, str(path))
    seen: set[str] = set()
    for pack in lock.packs:
        if pack.id in seen:
            raise PackFormatError(str(path), "packs", "each pack once", f"{pack.id} twice")
        seen.add(pack.id)
    return lock
