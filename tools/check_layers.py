#!/usr/bin/env python3
"""Checks that every C++ module includes only what the architecture lets it see.

CMake's link lines are not enough: all modules share one include root.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# module -> what it may include besides itself; docs/architecture.md tells why.
MAY_INCLUDE: dict[str, frozenset[str]] = {
    module: frozenset(others.split())
    for module, others in {
        "core": "",
        "io": "core",
        "graph": "core",
        "sampling": "core",
        "channel": "core",
        "kernels": "core graph",
        "kv": "core graph kernels",
        "packs": "core io graph",
        "models": "core io graph kv kernels",
        "adapters": "core io graph kernels packs",
        "engine": "core io graph sampling channel kernels kv packs models adapters",
        "bindings": "core io sampling channel packs engine",
    }.items()
}
# "bindings" only for the version that it reports.
MAY_INCLUDE_GGML = frozenset(
    {"io", "graph", "kernels", "kv", "packs", "models", "adapters", "bindings"}
)

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
GGML = re.compile(r"(ggml|gguf)[\w-]*\.h")
PYTHON = re.compile(r"pybind11/|Python\.h")


def find_fault(module: str, quote: str, include: str) -> str | None:
    """Returns what is wrong with one include of a file of `module`, or None."""
    if include.startswith("modularbase/"):
        target = include.split("/")[1]
        if target == module or target in MAY_INCLUDE[module]:
            return None
        return f"{module} may not include {target}"
    if GGML.fullmatch(include):
        return None if module in MAY_INCLUDE_GGML else f"{module} may not include ggml"
    if module == "bindings":
        return None
    if PYTHON.match(include):
        return "only bindings may include Python"
    if quote == '"':
        return 'expected "modularbase/<module>/<file>.h"'
    return None


def check_file(path: Path, module: str) -> Iterator[str]:
    """Yields a line for each include of a file that breaks a boundary."""
    text = path.read_text(encoding="utf-8")
    for match in INCLUDE.finditer(text):
        fault = find_fault(module, match[1], match[2])
        if fault:
            line = text.count("\n", 0, match.start(1)) + 1
            yield f"{path}:{line}: {match[2]}: {fault}"


def check_tree(root: Path) -> Iterator[str]:
    """Yields a line for each fault in the C++ sources below `root`."""
    folders = [path for path in (root / "cpp" / "modularbase").iterdir() if path.is_dir()]
    for folder in sorted([*folders, root / "bindings"]):
        if folder.name not in MAY_INCLUDE:
            yield f"{folder}: not in the table of modules of tools/check_layers.py"
            continue
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cpp"}:
                yield from check_file(path, folder.name)


def main() -> int:
    """Prints the faults; returns 1 if there are any."""
    faults = list(check_tree(ROOT))
    print("\n".join(faults) or "layers: every include is within its module's bounds")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
