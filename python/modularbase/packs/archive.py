"""Archives of packs: `.mbpack`, a zip of pack.gguf, manifest.json, README.md and maybe LICENSE.

An archive may come from anywhere: nothing is believed of it, and nothing but these four names is
ever written.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from modularbase.errors import PackFormatError
from modularbase.packs.inspection import check_pack
from modularbase.packs.manifest import Manifest, parse_manifest
from modularbase.storage.digest import CHUNK_BYTES, OnBytes
from modularbase.storage.files import appearing

SUFFIX = ".mbpack"
GGUF = "pack.gguf"
MANIFEST = "manifest.json"
README = "README.md"
LICENCE = "LICENSE"

_REQUIRED = (MANIFEST, GGUF, README)
_MAX_TEXT_BYTES = 1 << 20
_MAX_GGUF_BYTES = 1 << 34
_MAX_BYTES = {
    MANIFEST: _MAX_TEXT_BYTES,
    README: _MAX_TEXT_BYTES,
    LICENCE: _MAX_TEXT_BYTES,
    GGUF: _MAX_GGUF_BYTES,
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal contents give equal archives
# What zipfile raises on files that are no sound archives.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def write_archive(target: Path, gguf: Path, readme: str, licence: str | None = None) -> Manifest:
    """Puts a pack file and its texts into an archive; returns its manifest.

    Raises:
        PackFormatError: The pack file is not sound.
        InstallError: The archive cannot be written.
    """
    manifest = check_pack(gguf)
    texts = {MANIFEST: manifest.to_json(), README: readme}
    if licence is not None:
        texts[LICENCE] = licence
    with appearing(target) as part, zipfile.ZipFile(part, "x") as archive:
        for name, text in texts.items():
            archive.writestr(_member(name), text.encode())
        with gguf.open("rb") as source, archive.open(_member(GGUF), "w", force_zip64=True) as sink:
            shutil.copyfileobj(source, sink, CHUNK_BYTES)
    return manifest


def read_archive_manifest(path: Path) -> Manifest:
    """The manifest of an archive whose other members stay unread.

    Raises:
        PackFormatError: No sound archive, or no sound manifest.
    """
    with _opened(path) as archive:
        with archive.open(MANIFEST) as source:
            text = source.read(_MAX_TEXT_BYTES + 1)
        return parse_manifest(text, f"{path}:{MANIFEST}")


def unpack(path: Path, folder: Path, on_bytes: OnBytes) -> Manifest:
    """Writes the members of an archive into a folder and checks that they belong together.

    Args:
        path: The archive.
        folder: An empty folder.
        on_bytes: Called with the bytes of pack.gguf that are written.

    Raises:
        PackFormatError: No sound archive, a member it may not have, a pack file that is not sound,
            or a manifest that differs from the one in the pack file.
        OSError: The folder cannot be written.
    """
    with _opened(path) as archive:
        for member in archive.infolist():
            _extract(path, archive, member, folder, on_bytes if member.filename == GGUF else None)
    beside = parse_manifest((folder / MANIFEST).read_bytes(), f"{path}:{MANIFEST}")
    try:
        inside = check_pack(folder / GGUF)
    except PackFormatError as error:  # name what the user gave, not where it was unpacked
        raise PackFormatError(f"{path}:{GGUF}", error.field, error.expected, error.found) from error
    if beside != inside:
        field = first_difference(beside, inside)
        expected = f"{getattr(inside, field)!r}, as in {GGUF}"
        raise PackFormatError(f"{path}:{MANIFEST}", field, expected, repr(getattr(beside, field)))
    return inside


def first_difference(left: Manifest, right: Manifest) -> str:
    """The name of the first field in which two manifests differ."""
    fields = Manifest.model_fields
    return next(name for name in fields if getattr(left, name) != getattr(right, name))


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.external_attr = (stat.S_IFREG | 0o644) << 16
    return member


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise PackFormatError(str(path), "path", "an archive of a pack", found)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            yield archive
    except _BROKEN as error:
        found = str(error) or type(error).__name__
        raise PackFormatError(str(path), "archive", "a sound zip archive", found) from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    seen: set[str] = set()
    for member in members:
        _check_member(path, member)
        if member.filename in seen:
            raise PackFormatError(str(path), member.filename, "each member once", "it twice")
        seen.add(member.filename)
    for name in _REQUIRED:
        if name not in seen:
            raise PackFormatError(str(path), name, "a member of this name", "none")


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    # What the archive says, not what zipfile made of it: a NUL cuts the name short.
    name = member.orig_filename
    if name not in _MAX_BYTES:
        expected = f"no member but {', '.join(_MAX_BYTES)}"
        raise PackFormatError(str(path), "member", expected, repr(name))
    mode = member.external_attr >> 16
    if member.is_dir() or (stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
        raise PackFormatError(str(path), name, "a plain file", stat.filemode(mode))
    if member.header_offset < 0:  # zipfile would seek there, an error that looks like the disk's
        raise PackFormatError(str(path), name, "an offset in the file", str(member.header_offset))
    if member.flag_bits & 1:
        raise PackFormatError(str(path), name, "no password", "an encrypted member")
    if member.file_size > _MAX_BYTES[name]:
        expected = f"at most {_MAX_BYTES[name]} bytes"
        raise PackFormatError(str(path), name, expected, str(member.file_size))
    if name == GGUF and member.compress_type != zipfile.ZIP_STORED:
        raise PackFormatError(str(path), name, "a stored member", "a compressed one")


def _extract(
    path: Path,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    folder: Path,
    on_bytes: OnBytes | None,
) -> None:
    n_done = 0
    with archive.open(member) as source, (folder / member.filename).open("xb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            n_done += len(chunk)
            sink.write(chunk)
            if on_bytes:
                on_bytes(n_done)
    if n_done != member.file_size:  # zipfile stops there, but may come short
        expected = f"{member.file_size} bytes, as the archive says"
        raise PackFormatError(str(path), member.filename, expected, str(n_done))
