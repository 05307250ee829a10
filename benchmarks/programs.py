"""Builds the programs of benchmarks/cpp, with the compiler options of the package."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.ours import MeasurementError
from benchmarks.paths import CACHE, ROOT
from benchmarks.peers import build
from benchmarks.peers.process import PeerRunError, run

FOLDER = CACHE / "programs"
CMAKE_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DMODULARBASE_BUILD_BENCHMARKS=ON")


def ensure_program(name: str) -> Path:
    """Builds what has changed of a program and returns its path.

    Raises:
        MeasurementError: It does not build.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "build.log"
    log.unlink(missing_ok=True)
    print(f"building {name}, the first time for minutes", file=sys.stderr, flush=True)
    try:
        build.configure(ROOT, FOLDER, CMAKE_OPTIONS, log)
        build.build_target(FOLDER, name, log)
    except build.PeerBuildError as error:
        raise MeasurementError(str(error)) from error
    return FOLDER / "benchmarks" / "cpp" / name


def read_number(text: str) -> float:
    """Returns the number above zero that a program printed.

    Raises:
        MeasurementError: It printed something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise MeasurementError(f"expected one number above 0, found {text[:200]!r}")
    return value


def measure(program: Path, arguments: list[str]) -> float:
    """Runs a program that prints one number.

    Raises:
        MeasurementError: It failed, or printed something else.
    """
    try:
        return read_number(run([str(program), *arguments]))
    except PeerRunError as error:
        raise MeasurementError(str(error)) from error
