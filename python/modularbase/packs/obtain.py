"""Brings one pack from a file or a web server into a folder, verified."""

from __future__ import annotations

import re
import shutil
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modularbase.errors import InstallError, InvalidRequestError, PackFormatError
from modularbase.packs.archive import GGUF, MANIFEST, README, SUFFIX, unpack
from modularbase.packs.index import is_url
from modularbase.packs.inspection import check_pack
from modularbase.packs.manifest import Manifest
from modularbase.storage.digest import OnBytes, sha256_of
from modularbase.storage.disk import check_space
from modularbase.storage.http_download import DownloadError, download, size_of
from modularbase.storage.progress import InstallProgress, ProgressCallback, Stage

_FRAGMENT = re.compile("sha256=([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class ObtainedPack:
    """A verified pack in a folder of work in progress.

    Attributes:
        manifest: What it says of itself.
        folder: Holds what an installed pack has, except its record.
        sha256: Digest of pack.gguf.
        source: Path or URL it came from.
    """

    manifest: Manifest
    folder: Path
    sha256: str
    source: str

    @property
    def path(self) -> Path:
        """The pack file."""
        return self.folder / GGUF


def split_digest(place: str) -> tuple[str, str | None]:
    """Takes `#sha256=...` off an address.

    Raises:
        InvalidRequestError: Something else follows the #.
    """
    if not is_url(place):
        return place, None
    address, mark, fragment = place.partition("#")
    match = _FRAGMENT.fullmatch(fragment)
    if mark and not match:
        expected = "nothing, or sha256= and 64 hexadecimal digits, behind the #"
        raise InvalidRequestError("pack", expected, repr(place))
    return address, match[1] if match else None


def obtain(
    place: str, folder: Path, sha256: str | None, progress: ProgressCallback
) -> ObtainedPack:
    """Fetches and checks a pack.

    Args:
        place: Absolute path or http(s) address of an archive or a pack file.
        folder: An empty folder of work in progress.
        sha256: Digest of that file, where it is known.
        progress: Told what is being done.

    Raises:
        PackFormatError: It is not a sound pack.
        InstallError: It cannot be fetched or written, or has another digest.
    """
    name = _name(place)
    source = _download(place, folder / "download", name, progress) if is_url(place) else Path(place)
    if not source.is_file():
        raise InstallError("there is no such file", "not_found", path=place)
    if sha256 is not None:
        found = sha256_of(source, _reporter(progress, name, "verify", source))
        if found != sha256:
            reason = f"the file has sha256 {found}, expected {sha256}"
            raise InstallError(reason, "digest", name=name, source=place)
    content = folder / "content"
    content.mkdir()
    check_space(name, folder, source.stat().st_size)
    try:
        manifest = _unpack(source, name, content, progress)
    except PackFormatError as error:  # name what the user knows, not where it lies meanwhile
        file = error.file.replace(str(content / GGUF), place).replace(str(source), place)
        raise PackFormatError(file, error.field, error.expected, error.found) from error
    digest = sha256_of(content / GGUF, _reporter(progress, name, "verify", content / GGUF))
    return ObtainedPack(manifest, content, digest, place)


def _name(place: str) -> str:
    path = urllib.parse.unquote(urllib.parse.urlsplit(place).path) if is_url(place) else place
    return path.rpartition("/")[2]


def _download(url: str, target: Path, name: str, progress: ProgressCallback) -> Path:
    try:
        n_bytes = size_of(url)
        check_space(name, target.parent, n_bytes)
        download(
            url,
            target,
            n_bytes,
            lambda n: progress(InstallProgress(name, "download", n, n_bytes)),
        )
    except DownloadError as error:
        kind: Literal["not_found", "network"] = "not_found" if error.status == 404 else "network"
        raise InstallError(str(error), kind, name=name, source=url) from error
    return target


def _unpack(source: Path, name: str, content: Path, progress: ProgressCallback) -> Manifest:
    report = _reporter(progress, name, "unpack", source)
    if name.endswith(SUFFIX):
        return unpack(source, content, report)
    shutil.copyfile(source, content / GGUF)
    manifest = check_pack(content / GGUF)
    (content / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    card = f"# {manifest.name}\n\n{manifest.description}\n"
    (content / README).write_text(card, encoding="utf-8")
    return manifest


def _reporter(progress: ProgressCallback, name: str, stage: Stage, file: Path) -> OnBytes:
    n_total = file.stat().st_size
    return lambda n_done: progress(InstallProgress(name, stage, n_done, n_total))
