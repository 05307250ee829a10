"""Whether installed packs are still what was installed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from modularbase.errors import InstallError, PackFormatError
from modularbase.packs.archive import SUFFIX, first_difference, unpack
from modularbase.packs.inspection import check_pack
from modularbase.packs.manifest import Manifest
from modularbase.packs.store import InstalledPack, PackStore
from modularbase.packs.tree import missing_dependencies
from modularbase.storage.digest import sha256_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """One installed pack; `faults` is empty when all is well."""

    id: str
    version: str
    faults: tuple[str, ...]


def verify_installed(pack_id: str, version: str, store: PackStore) -> Verdict:
    """Checks digest, format, manifest and dependencies of an installed pack."""
    try:
        pack = store.read(pack_id, version)
    except InstallError as error:
        return Verdict(pack_id, version, (error.reason,))
    faults = [
        *_content_faults(pack),
        *(f"needs {need}, which is not installed" for need in _missing(pack, store)),
    ]
    return Verdict(pack_id, version, tuple(faults))


def verify_file(path: Path) -> Manifest:
    """Checks an archive or a pack file all through.

    Raises:
        PackFormatError: It is not sound.
    """
    if path.suffix != SUFFIX:
        return check_pack(path)
    with tempfile.TemporaryDirectory(prefix="modularbase-") as folder:
        return unpack(path, Path(folder), lambda _: None)


def _content_faults(pack: InstalledPack) -> list[str]:
    found = sha256_of(pack.path, lambda _: None)
    if found != pack.record.sha256:
        return [f"pack.gguf has sha256 {found}, installed was {pack.record.sha256}"]
    try:
        inside = check_pack(pack.path)
    except PackFormatError as error:
        return [str(error)]
    if inside != pack.manifest:
        field = first_difference(inside, pack.manifest)
        return [f"manifest.json and pack.gguf differ in {field}"]
    return []


def _missing(pack: InstalledPack, store: PackStore) -> list[str]:
    return [str(need) for need in missing_dependencies(pack.manifest, store)]
