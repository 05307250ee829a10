"""Sizes as people write them: 256MB, 1.5GiB, 4096."""

from __future__ import annotations

import re

from modularbase.errors import InvalidRequestError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(field: str, size: int | str) -> int:
    """Reads a size in bytes, or with a unit.

    Args:
        field: Named in the error.
        size: Bytes, or a string such as "256MB" (10^6) or "256MiB" (2^20).

    Raises:
        InvalidRequestError: It is no size.
    """
    match = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not isinstance(size, (int, str)):
        raise InvalidRequestError(field, "bytes, or a size such as '256MB'", repr(size))
    n_bytes = int(float(match[1]) * unit)
    if n_bytes >= 1 << 62:
        raise InvalidRequestError(field, "less than 2^62 bytes", repr(size))
    return n_bytes
