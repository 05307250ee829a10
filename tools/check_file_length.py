#!/usr/bin/env python3
"""Checks that no source file has grown past the hard stop; long before that, split it by idea."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
SUFFIXES = frozenset({".h", ".c", ".cpp", ".py", ".sh", ".cmake"})  # .pyi is generated


def source_files(root: Path) -> list[Path]:
    """Returns the sources that git has or would add."""
    command = [
        "git",
        "-C",
        str(root),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = [root / name for name in listed.split("\0") if name]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file()]


def check_files(paths: list[Path]) -> Iterator[str]:
    """Yields a line for each file that is too long."""
    for path in paths:
        n_lines = path.read_bytes().count(b"\n")
        if n_lines > MAX_LINES:
            yield f"{path}: {n_lines} lines, at most {MAX_LINES}"


def main() -> int:
    """Prints the files that are too long; returns 1 if there are any."""
    paths = source_files(ROOT)
    faults = list(check_files(paths))
    print("\n".join(faults) or f"file length: {len(paths)} files of at most {MAX_LINES} lines")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
