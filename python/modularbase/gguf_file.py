"""What a GGUF file holds, as the runtime reads it."""

from __future__ import annotations

import os

from modularbase import _core
from modularbase.request_specs import utf8_path
from modularbase.types import FloatArray


def read_metadata(path: str | os.PathLike[str]) -> dict[str, object]:
    """All metadata of a GGUF file.

    Raises:
        BaseLoadError: The file is not a usable GGUF file.
    """
    return _core.read_gguf_metadata(utf8_path(path))


def read_matrix(path: str | os.PathLike[str], name: str) -> FloatArray:
    """A matrix of a GGUF file in F32, [n_rows, n_per_row].

    Raises:
        BaseLoadError: The file is not usable, or has no such matrix.
    """
    return _core.read_gguf_rows(utf8_path(path), name)
