"""`modularbase info` and `modularbase doctor`: what a file is, what this machine can do."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from modularbase.bases import install
from modularbase.cli.console import DEFAULT_BASE, Json, print_facts, print_json
from modularbase.engine import build_info
from modularbase.gguf_file import read_metadata

_PACKAGES = ("modularbase", "numpy", "tokenizers", "jinja2", "huggingface-hub")


def info(
    base: Annotated[
        str, typer.Argument(help="Name of a base, or path of a GGUF file.")
    ] = DEFAULT_BASE,
    as_json: Json = False,
) -> None:
    """Prints a base's metadata (without its vocabulary)."""
    path = install.resolve(base)
    values: dict[str, Any] = {"path": str(path), "n_bytes": Path(path).stat().st_size}
    for key, value in read_metadata(path).items():
        values[key] = (
            f"[{len(value)} values]" if isinstance(value, list) and len(value) > 16 else value
        )
    if as_json:
        print_json(values)
    else:
        print_facts(values, base)


def doctor(as_json: Json = False) -> None:
    """Prints what this installation computes with: CPU features, threads, memory, versions."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    facts |= build_info()
    for package in _PACKAGES:
        facts[package] = _version(package)
    if as_json:
        print_json(facts)
    else:
        print_facts(facts, "modularbase")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
