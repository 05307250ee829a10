"""Files of any type of pack: domain packs and router packs."""

from __future__ import annotations

from pathlib import Path

from modularbase.packs import pack_file, router_file
from modularbase.packs.manifest import Manifest


def is_pack(path: Path) -> bool:
    """Whether a GGUF file says that it is a pack; a base does not.

    Raises:
        PackFormatError: It is no sound GGUF file.
    """
    return _architecture(path) in (pack_file.ARCHITECTURE, router_file.ARCHITECTURE)


def is_router(path: Path) -> bool:
    """Whether a GGUF file says that it is a router pack.

    Raises:
        PackFormatError: It is no sound GGUF file.
    """
    return _architecture(path) == router_file.ARCHITECTURE


def check_pack(path: Path) -> Manifest:
    """Checks a file of any type of pack; returns what it says of itself.

    Raises:
        PackFormatError: It is no sound pack.
    """
    if is_router(path):
        return router_file.read_router(path).manifest
    return pack_file.inspect_pack(path).manifest


def _architecture(path: Path) -> object:
    return pack_file.read_metadata(path).get("general.architecture")
