"""Reads tensors of a safetensors file one at a time, as F32.

The safetensors library gives BF16 only through PyTorch, which importing a base does not need. The
format: the header's length (u64, little endian), the header (JSON: name -> dtype, shape and
data_offsets), then the data that the offsets count from.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modularbase.errors import BaseLoadError
from modularbase.types import FloatArray

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: Where it lies.
        name: Its name there.
        dtype: "F32", "F16" or "BF16".
        shape: Rows first, as in PyTorch.
        offset: Bytes before it in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> FloatArray:
        """Its values, [*shape].

        Raises:
            BaseLoadError: The file changed, or a value is no finite number.
        """
        n = math.prod(self.shape)
        try:
            raw = np.fromfile(self.file, _TYPES[self.dtype], count=n, offset=self.offset)
        except OSError as error:
            raise _fault(self.file, self.name, "readable", error.strerror) from error
        if raw.size != n:
            raise _fault(self.file, self.name, f"{n} values", str(raw.size))
        values = _widened(raw) if self.dtype == "BF16" else raw.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise _fault(self.file, self.name, "finite values", "NaN or infinity")
        return values.reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        BaseLoadError: It is not there, damaged or cut short, or holds other types.
    """
    try:
        n_bytes = file.stat().st_size
        with file.open("rb") as opened:
            n_header = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if not 2 <= n_header <= min(_MAX_HEADER_BYTES, n_bytes - _LENGTH_BYTES):
                found = f"{n_header} in a file of {n_bytes}"
                raise _fault(file, "header length", "bytes of a header within the file", found)
            header = json.loads(opened.read(n_header))
    except OSError as error:
        raise _fault(file, "file", "a safetensors file", error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise _fault(file, "header", "valid JSON", str(error)) from error
    if not isinstance(header, dict):
        raise _fault(file, "header", "a JSON object", type(header).__name__)
    header.pop("__metadata__", None)
    start = _LENGTH_BYTES + n_header
    return {name: _tensor(file, name, entry, start, n_bytes) for name, entry in header.items()}


def _tensor(file: Path, name: str, entry: Any, start: int, n_bytes: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        expected = "dtype, shape and two data_offsets"
        raise _fault(file, name, expected, str(entry)) from error
    if dtype not in _TYPES:
        raise _fault(file, f"{name}: dtype", " or ".join(_TYPES), str(dtype))
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _fault(file, name, "sizes and offsets that are not negative", str(numbers))
    if end - begin != math.prod(shape) * _TYPES[dtype].itemsize:
        found = f"{end - begin} for {dtype} {shape}"
        raise _fault(file, f"{name}: data_offsets", "the bytes of its shape", found)
    if start + end > n_bytes:
        expected = f"data within the file's {n_bytes} bytes"
        raise _fault(file, name, expected, f"an end at {start + end}: the file is cut short")
    return StoredTensor(file, name, dtype, tuple(shape), start + begin)


def _widened(bf16: np.ndarray[Any, Any]) -> FloatArray:
    """BF16 is the upper half of an F32."""
    values: FloatArray = (bf16.astype(np.uint32) << 16).view(np.float32)
    return values


def _fault(file: Path, field: str, expected: str, found: str | None) -> BaseLoadError:
    return BaseLoadError(str(file), field, expected, found or "an error")
