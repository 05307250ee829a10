#!/usr/bin/env python3
"""Obtains the ggml sources that third_party/ggml.lock pins.

``fetch_ggml.py`` puts them into third_party/ggml and does nothing when they are there already;
``fetch_ggml.py --archive DEST`` only puts the verified source distribution at DEST, for what needs
more of it. Downloads are kept in the user's cache folder (or in $MODULARBASE_CACHE_DIR), so the
network is needed once. Nothing of an archive is run or unpacked before its sha256 is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".fetched"


class FetchError(RuntimeError):
    """The pinned sources could not be obtained; the message says why."""


@dataclass(frozen=True)
class Lock:
    """What third_party/ggml.lock pins; the paths are inside the archive's top folder."""

    name: str
    version: str
    sha256: str
    folder: str
    licence: str

    @property
    def archive_name(self) -> str:
        """The file name that the package index gives the source distribution."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def read_lock(path: Path) -> Lock:
    """Reads the ``key = value`` lines of a lock file.

    Raises:
        FetchError: The file cannot be read, or a field is missing, unknown or malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FetchError(f"{path}: {error.strerror}") from error
    pairs = [line.partition("=") for line in lines if line.strip() and not line.startswith("#")]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    names = {field.name for field in fields(Lock)}
    if set(values) != names:
        found = ", ".join(sorted(values)) or "none"
        raise FetchError(f"{path}: expected the fields {', '.join(sorted(names))}, found {found}")
    if not re.fullmatch("[0-9a-f]{64}", values["sha256"]):
        raise FetchError(f"{path}: sha256: expected 64 hex digits, found {values['sha256']!r}")
    return Lock(**values)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns the folder that keeps downloads between builds."""
    if named := os.environ.get("MODULARBASE_CACHE_DIR"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "modularbase"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "modularbase" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modularbase"


def pip_download(lock: Lock, folder: Path) -> Path:
    """Downloads the source distribution with pip, which checks the hash before it runs any of it.

    Raises:
        FetchError: pip is missing, the network is, or the archive is not the pinned one.
    """
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{sys.executable} has no pip to download {lock.archive_name} with")
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{lock.name}=={lock.version} --hash=sha256:{lock.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    # pip asks the package's build backend for its metadata; where that is installed, it is used.
    if importlib.util.find_spec("scikit_build_core") is not None:
        command.append("--no-build-isolation")
    command += ["--require-hashes", "--retries", "2", "--dest", str(folder), "-r", str(requirement)]
    done = subprocess.run(
        command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False
    )
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    if mismatch := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
        raise wrong_hash(lock.archive_name, lock, mismatch[1])
    said = done.stderr.strip().splitlines()
    reason = "\n  ".join([line for line in said if line.startswith("ERROR")] or said[-4:])
    raise FetchError(
        f"pip could not download {lock.name}=={lock.version} (is there a network?):\n  {reason}"
    )


def wrong_hash(what: object, lock: Lock, found: str) -> FetchError:
    """Returns the error for an archive that is not the pinned one."""
    return FetchError(f"{what}: sha256: expected {lock.sha256}, found {found}")


def obtain_archive(lock: Lock, scratch: Path) -> Path:
    """Returns a verified archive: the cached one, else a new download, cached where possible.

    Raises:
        FetchError: The archive could not be had, or is not the pinned one.
    """
    cached = cache_folder() / "downloads" / lock.archive_name
    if cached.is_file():
        if sha256_of(cached) == lock.sha256:
            return cached
        print(f"fetch_ggml: {cached} is damaged, downloading it again", file=sys.stderr)
    print(f"fetch_ggml: downloading {lock.archive_name}, once", file=sys.stderr, flush=True)
    archive = pip_download(lock, scratch)
    if (found := sha256_of(archive)) != lock.sha256:
        raise wrong_hash(archive.name, lock, found)
    try:
        place_file(archive, cached)
    except OSError as error:
        print(f"fetch_ggml: not cached in {cached.parent}: {error.strerror}", file=sys.stderr)
        return archive
    return cached


def place_file(source: Path, target: Path) -> None:
    """Makes `target` a whole copy of `source`, or leaves it as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        shutil.copyfile(source, part)
        part.replace(target)


def extract(archive: Path, lock: Lock, into: Path) -> None:
    """Extracts the pinned folder, and the licence as LICENSE, into the empty folder `into`.

    Raises:
        FetchError: A member is no file or would leave `into`, or one is missing.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if inside == PurePosixPath(lock.licence):
                relative = PurePosixPath("LICENSE")
            elif inside.is_relative_to(lock.folder):
                relative = inside.relative_to(lock.folder)
            else:
                continue
            extract_member(tar, member, relative, into)
    for needed in ("CMakeLists.txt", "LICENSE"):
        if not (into / needed).is_file():
            raise FetchError(f"{archive.name}: {needed} is not in {lock.folder} or {lock.licence}")


def extract_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, relative: PurePosixPath, into: Path
) -> None:
    """Writes one file of the archive, keeping its time so that rebuilds see no change."""
    if ".." in relative.parts or not (member.isfile() or member.isdir()):
        raise FetchError(f"{member.name}: expected a file inside the archive's folder")
    if member.isdir():
        return
    target = into / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    data = tar.extractfile(member)
    assert data is not None  # a regular file has contents
    with data, target.open("wb") as out:
        shutil.copyfileobj(data, out)
    os.utime(target, (member.mtime, member.mtime))


def ensure_tree(lock: Lock, target: Path) -> bool:
    """Makes `target` the pinned tree; says whether that took any work.

    Raises:
        FetchError: The sources could not be obtained.
    """
    if is_current(target, lock):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        work = Path(scratch)
        tree = work / "tree"
        tree.mkdir()
        extract(obtain_archive(lock, work), lock, tree)
        (tree / STAMP).write_text(lock.sha256 + "\n")
        try:
            if target.exists():
                target.rename(work / "old")
            tree.rename(target)
        except OSError:
            if not is_current(target, lock):  # else another build has just done the same
                raise
    return True


def is_current(target: Path, lock: Lock) -> bool:
    """Says whether `target` was extracted from the pinned archive."""
    stamp = target / STAMP
    return stamp.is_file() and stamp.read_text().strip() == lock.sha256


def ensure_archive(lock: Lock, target: Path) -> None:
    """Makes `target` the pinned archive.

    Raises:
        FetchError: The archive could not be obtained.
    """
    if target.is_file() and sha256_of(target) == lock.sha256:
        return
    with tempfile.TemporaryDirectory(prefix="fetch-") as scratch:
        place_file(obtain_archive(lock, Path(scratch)), target)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description="Obtain the pinned ggml sources.")
    parser.add_argument("--lock", type=Path, default=ROOT / "third_party" / "ggml.lock")
    parser.add_argument("--into", type=Path, default=ROOT / "third_party" / "ggml")
    parser.add_argument("--archive", type=Path, help="only put the verified archive at this path")
    options = parser.parse_args(argv)
    try:
        lock = read_lock(options.lock)
        if options.archive:
            ensure_archive(lock, options.archive)
        elif ensure_tree(lock, options.into):
            print(f"fetch_ggml: ggml of {lock.name} {lock.version} is in {options.into}")
    except (FetchError, OSError, tarfile.TarError) as error:
        print(f"fetch_ggml: error: {error}", file=sys.stderr)
        if not options.archive:
            hint = (
                "to build with a ggml source tree of your own: -DMODULARBASE_GGML_DIR=/path/to/ggml"
            )
            print(f"fetch_ggml: {hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
