"""Which base a file is: what packs are made for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from packaging.version import InvalidVersion, Version

from modularbase.bases.catalogue import CATALOGUE
from modularbase.storage.digest import sha256_of

_DEFAULT_VERSION = "1.0.0"


class BaseIdentity:
    """Name, version and digest of a base.

    Attributes:
        id: Name in the catalogue where the file is that base; else `general.name` in lower case
            with '-' between the words, or the file's name.
        version: `general.version` where it is one, else 1.0.0.
        detail_heads: As the catalogue has them; none of a base that it does not know.
    """

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        """Reads what the file says of itself."""
        self._path = path
        self.id = _id(path, metadata)
        self.version = _version(metadata.get("general.version"))
        self.detail_heads = next((e.detail_heads for e in CATALOGUE if e.name == self.id), ())

    @cached_property
    def digest(self) -> str:
        """The file's digest behind "sha256:"; the file is read when somebody first asks."""
        return "sha256:" + sha256_of(self._path, lambda _: None)


def _id(path: Path, metadata: Mapping[str, object]) -> str:
    for entry in CATALOGUE:
        if path.name == entry.filename and path.parent.name == entry.name:
            return entry.name
    name = metadata.get("general.name")
    for entry in CATALOGUE:
        if entry.general_name is not None and name == entry.general_name:
            return entry.name
    words = re.findall(r"[\w.]+", (name if isinstance(name, str) else "") or path.stem)
    return "-".join(words).lower()[:64].strip("-._") or "base"


def _version(value: object) -> str:
    try:
        return str(Version(str(value)))
    except InvalidVersion:
        return _DEFAULT_VERSION
