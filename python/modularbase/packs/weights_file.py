"""Trained weights as trainers leave them: .safetensors or .npz, read with numpy alone."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from modularbase.errors import PackFormatError
from modularbase.types import FloatArray

SUFFIXES = (".safetensors", ".npz")

_MAX_HEADER_BYTES = 64 << 20
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


def read_weights(path: Path) -> dict[str, FloatArray]:
    """All tensors of a file, as F32, by name.

    Raises:
        PackFormatError: Not such a file, or a tensor of a type that is not F32, F16 or BF16.
    """
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except OSError as error:
        _refuse(path, "file", "a file of weights", error.strerror or type(error).__name__)


def _read_npz(path: Path) -> dict[str, FloatArray]:
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):  # np.load would take it for something else
                _refuse(path, "file", "arrays in numpy's npz format", "no zip archive")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        _refuse(path, "file", "arrays in numpy's npz format", str(error))
    for name, array in found.items():
        dtype = getattr(array, "dtype", "no array")
        if dtype not in (np.float32, np.float16):
            _refuse(path, name, "F32 or F16", str(dtype))
    return {name: array.astype(np.float32) for name, array in found.items()}


def _read_safetensors(path: Path) -> dict[str, FloatArray]:
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        n_rest = path.stat().st_size - 8
        if not 2 <= n_header <= min(_MAX_HEADER_BYTES, n_rest):
            _refuse(path, "header", "a length that fits the file", str(n_header))
        try:
            header = json.loads(file.read(n_header))
        except (ValueError, RecursionError) as error:
            _refuse(path, "header", "JSON", str(error))
        data = np.fromfile(file, dtype=np.uint8)
    if not isinstance(header, dict):
        _refuse(path, "header", "an object", type(header).__name__)
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, facts, data) for name, facts in header.items()}


def _tensor(path: Path, name: str, facts: Any, data: NDArray[np.uint8]) -> FloatArray:
    if not isinstance(facts, Mapping) or facts.get("dtype") not in tuple(_WIDTHS):
        found = facts.get("dtype") if isinstance(facts, Mapping) else facts
        _refuse(path, name, "F32, F16 or BF16", repr(found))
    shape, offsets = facts.get("shape"), facts.get("data_offsets")
    if not _are_sizes(shape) or 0 in shape or not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, name, "a shape and two offsets", f"{shape!r} and {offsets!r}")
    begin, end = offsets
    n_bytes = math.prod(shape) * _WIDTHS[facts["dtype"]]
    if end > data.size or end - begin != n_bytes:
        _refuse(path, name, f"{n_bytes} bytes inside the file", f"bytes {begin} to {end}")
    raw = data[begin:end].tobytes()
    if facts["dtype"] == "BF16":  # the upper half of an F32
        wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    values = np.frombuffer(raw, dtype="<f4" if facts["dtype"] == "F32" else "<f2")
    return values.astype(np.float32).reshape(shape)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _refuse(path: Path, field: str, expected: str, found: str) -> NoReturn:
    raise PackFormatError(str(path), field, expected, found)
