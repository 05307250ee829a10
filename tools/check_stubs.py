#!/usr/bin/env python3
"""Checks that python/modularbase/_core.pyi says what the built extension offers.

``check_stubs.py --update`` writes it anew. Both sides are formatted alike first.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "python" / "modularbase" / "_core.pyi"
MODULE = "modularbase._core"


def generate_stub() -> str:
    """Returns the stub of the installed extension.

    Raises:
        subprocess.CalledProcessError: The extension cannot be imported or typed.
    """
    with tempfile.TemporaryDirectory() as folder:
        generator = [sys.executable, "-m", "pybind11_stubgen", "--exit-code", "-o", folder, MODULE]
        subprocess.run(generator, check=True, cwd=folder, stdout=sys.stderr)
        return format_stub((Path(folder) / "modularbase" / "_core.pyi").read_text())


def format_stub(text: str) -> str:
    """Returns the stub in the format of the project's Python."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "_core.pyi", "-"]
    done = subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    return done.stdout


def main() -> int:
    """Prints how the stub differs from the extension; returns 1 if it does."""
    parser = argparse.ArgumentParser(description="Compare the extension with its stub.")
    parser.add_argument("--update", action="store_true", help="write the stub anew")
    options = parser.parse_args()
    wanted = generate_stub()
    if options.update:
        STUB.write_text(wanted)
        return 0
    found = format_stub(STUB.read_text()) if STUB.is_file() else ""
    if found == wanted:
        print("stubs: _core.pyi is what the extension offers")
        return 0
    lines = difflib.unified_diff(
        found.splitlines(), wanted.splitlines(), str(STUB), "the extension", lineterm=""
    )
    print("\n".join(lines))
    print("\nstubs: python/modularbase/_core.pyi has drifted; run: make stubs")
    return 1


if __name__ == "__main__":
    sys.exit(main())
