"""Reads GGUF metadata for tests. One function, so that the C++ reader can take its place."""

from __future__ import annotations

import struct
from pathlib import Path

Value = bool | int | float | str | bytes | list["Value"]

# GGUF value types 0..7 and 10..12: format character; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0

    def scalars(self, fmt: str, n: int) -> tuple[int | float | bool, ...]:
        layout = struct.Struct(f"<{n}{fmt}")
        values = layout.unpack_from(self.data, self.pos)
        self.pos += layout.size
        return values

    def string(self) -> str | bytes:
        (n_bytes,) = struct.unpack_from("<Q", self.data, self.pos)
        start = self.pos + 8
        self.pos = start + n_bytes
        raw = self.data[start : self.pos]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalars(_SCALARS[kind], 1)[0]
        item, n = struct.unpack_from("<IQ", self.data, self.pos)
        self.pos += 12
        if item in _SCALARS:
            return list(self.scalars(_SCALARS[item], n))
        return [self.value(item) for _ in range(n)]


def read_gguf_metadata(path: Path) -> dict[str, Value]:
    """Returns the key-value section; strings that are not UTF-8 come as bytes."""
    cursor = _Cursor(path.read_bytes())
    if cursor.data[:4] != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    cursor.pos = 16  # magic, version, tensor count
    (n_keys,) = cursor.scalars("Q", 1)
    metadata: dict[str, Value] = {}
    for _ in range(int(n_keys)):
        key = cursor.string()
        assert isinstance(key, str)
        (kind,) = cursor.scalars("I", 1)
        metadata[key] = cursor.value(int(kind))
    return metadata
