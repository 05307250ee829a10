"""Where packs are found: an index.json in a folder or on a web server, or a folder as it is."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt

from modularbase.errors import InstallError, PackFormatError
from modularbase.packs.archive import SUFFIX, read_archive_manifest
from modularbase.packs.inspection import check_pack, is_pack
from modularbase.packs.manifest import Manifest, PackId, PackVersion, parse_model
from modularbase.storage.digest import sha256_of
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.storage.http_download import DownloadError, fetch

INDEX_FILE = "index.json"

_MAX_INDEX_BYTES = 64 << 20


def _check_file(value: str) -> str:
    path = PurePosixPath(value)
    unsafe = path.is_absolute() or ".." in path.parts or set(value) & set("\\:?#\0")
    if unsafe or path.suffix not in (SUFFIX, ".gguf"):
        raise ValueError("expected a .mbpack or .gguf file below the index")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class IndexedPack(_Part):
    """One pack of an index.json."""

    id: PackId
    version: PackVersion
    file: Annotated[str, AfterValidator(_check_file)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    n_bytes: NonNegativeInt
    manifest: Manifest


class Index(_Part):
    """An index.json."""

    index_version: Literal[1] = 1
    packs: tuple[IndexedPack, ...] = ()


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A pack that can be had.

    Attributes:
        manifest: What it says of itself.
        location: Path or URL of its archive or pack file.
        sha256: Digest of that file; None in a folder without an index.
        n_bytes: Size of that file.
    """

    manifest: Manifest
    location: str
    sha256: str | None
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PackIndex:
    """Packs that can be had from one place."""

    place: str
    entries: tuple[IndexEntry, ...]

    def versions(self, pack_id: str) -> Sequence[Manifest]:
        """All versions of a pack: an index is a `PackSource`."""
        return [entry.manifest for entry in self.entries if entry.manifest.id == pack_id]

    def entry(self, pack_id: str, version: str) -> IndexEntry | None:
        """Where a version can be had, or None."""
        for entry in self.entries:
            if (entry.manifest.id, entry.manifest.version) == (pack_id, version):
                return entry
        return None


def open_index(place: str | os.PathLike[str]) -> PackIndex:
    """Reads what a place has.

    Args:
        place: A folder (its index.json, else the packs that lie in it), an index.json, or the
            http(s) address of an index.json or of the folder it lies in.

    Raises:
        InstallError: The place cannot be reached or read.
        PackFormatError: Its index, or a pack in a folder without one, is not sound.
    """
    text = os.fspath(place)
    if is_url(text):
        return _read_web_index(text)
    path = Path(text).expanduser()
    try:
        if path.is_dir() and not (path / INDEX_FILE).exists():
            return PackIndex(text, tuple(_scan(path)))
        file = path / INDEX_FILE if path.is_dir() else path
        index = _parse(file.read_bytes(), str(file))
    except OSError as error:
        raise InstallError(
            f"cannot read the index ({error.strerror})", "not_found", path=text
        ) from error
    return PackIndex(
        text,
        tuple(
            IndexEntry(pack.manifest, str(file.parent / pack.file), pack.sha256, pack.n_bytes)
            for pack in index.packs
        ),
    )


def write_index(folder: Path) -> PackIndex:
    """Writes the index.json of the packs that lie in a folder.

    Raises:
        PackFormatError: One of them is not sound.
        InstallError: The folder cannot be read or written.
    """
    with disk_errors(INDEX_FILE, folder):
        entries = _scan(folder)
    packs = [
        IndexedPack(
            id=entry.manifest.id,
            version=entry.manifest.version,
            file=Path(entry.location).name,
            sha256=sha256_of(Path(entry.location), lambda _: None),
            n_bytes=entry.n_bytes,
            manifest=entry.manifest,
        )
        for entry in entries
    ]
    index = Index(packs=tuple(packs))
    with appearing(folder / INDEX_FILE) as part:
        part.write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return open_index(folder)


def is_url(text: str) -> bool:
    """Whether a place is on the web."""
    return text.startswith(("http://", "https://"))


def _scan(folder: Path) -> list[IndexEntry]:
    entries: dict[tuple[str, str], IndexEntry] = {}
    # An archive before the pack file it was made from: it has the texts too.
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix != SUFFIX, path.name)):
        if path.suffix == SUFFIX:
            manifest = read_archive_manifest(path)
        elif path.suffix == ".gguf" and is_pack(path):
            manifest = check_pack(path)
        else:
            continue
        known = entries.get((manifest.id, manifest.version))
        if known and known.manifest == manifest:
            continue
        if known:
            expected = f"a version of its own ({known.location} is {manifest.id} too)"
            raise PackFormatError(str(path), "version", expected, manifest.version)
        entry = IndexEntry(manifest, str(path), None, path.stat().st_size)
        entries[manifest.id, manifest.version] = entry
    return list(entries.values())


def _read_web_index(url: str) -> PackIndex:
    if not urllib.parse.urlsplit(url).path.endswith(".json"):
        url = url.rstrip("/") + "/" + INDEX_FILE
    try:
        index = _parse(fetch(url, _MAX_INDEX_BYTES), url)
    except DownloadError as error:
        kind: Literal["not_found", "network"] = "not_found" if error.status == 404 else "network"
        raise InstallError(f"cannot read the index: {error}", kind, source=url) from error
    return PackIndex(
        url,
        tuple(
            IndexEntry(
                pack.manifest,
                urllib.parse.urljoin(url, urllib.parse.quote(pack.file)),
                pack.sha256,
                pack.n_bytes,
            )
            for pack in index.packs
        ),
    )


def _parse(text: bytes, file: str) -> Index:
    index = parse_model(Index, text, file)
    seen: set[tuple[str, str]] = set()
    for pack in index.packs:
        name = f"{pack.id} {pack.version}"
        if (pack.manifest.id, pack.manifest.version) != (pack.id, pack.version):
            found = f"{pack.manifest.id} {pack.manifest.version}"
            raise PackFormatError(file, "manifest", f"that of {name}", found)
        if (pack.id, pack.version) in seen:
            raise PackFormatError(file, "packs", "each version once", f"{name} twice")
        seen.add((pack.id, pack.version))
    return index
