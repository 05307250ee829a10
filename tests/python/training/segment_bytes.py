"""Segments read and written with `struct` alone, from what docs/weight-channel.md says of them.

Knows nothing of the C++ side on purpose: if the two disagree, one of them is not as documented.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

LAYOUT_VERSION = 1
BYTE_ORDER = 0x01020304
OPEN = 1

START = struct.Struct("<8sIIQQQI20x")
WEIGHTS = struct.Struct("<QQ2Q32xQQQQQ2Q72x")
ENTRY = struct.Struct("<64sII4QQQ8x")
RING = struct.Struct("<QQ48xQ56xQQQQI28x")
assert (START.size, WEIGHTS.size, ENTRY.size, RING.size) == (64, 192, 128, 192)

_MASK = 2**64 - 1
_P1, _P2, _P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P4, _P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def shm_file(name: str) -> Path:
    """The file that Linux shows a segment as."""
    return Path(f"/dev/shm/modularbase-{os.geteuid()}-{name}")


def start_of(pid: int) -> int:
    """When a process began, in clock ticks since the system did."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 1 :].split()[19])


def _rotl(x: int, n: int) -> int:
    return (x << n | x >> (64 - n)) & _MASK


def _lane(total: int, word: int) -> int:
    return _rotl((total + word * _P2) & _MASK, 31) * _P1 & _MASK


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its specification."""
    n, at = len(data), 0
    value = _P5
    if n >= 32:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        while at + 32 <= n:
            words = struct.unpack_from("<4Q", data, at)
            lanes = [_lane(lane, word) for lane, word in zip(lanes, words, strict=True)]
            at += 32
        value = sum(_rotl(lane, k) for lane, k in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            value = ((value ^ _lane(0, lane)) * _P1 + _P4) & _MASK
    value = (value + n) & _MASK
    while at + 8 <= n:
        (word,) = struct.unpack_from("<Q", data, at)
        value = (_rotl(value ^ _lane(0, word), 27) * _P1 + _P4) & _MASK
        at += 8
    if at + 4 <= n:
        (word,) = struct.unpack_from("<I", data, at)
        value = (_rotl(value ^ (word * _P1 & _MASK), 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in data[at:]:
        value = _rotl(value ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    value = (value ^ value >> 33) * _P2 & _MASK
    value = (value ^ value >> 29) * _P3 & _MASK
    return value ^ value >> 32


@dataclass
class Entry:
    """One tensor of the directory."""

    name: str
    type: int
    ne: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass
class Segment:
    """A weight segment, taken apart."""

    generation: int
    writing: int
    digests: tuple[int, int]
    json: str
    entries: list[Entry]
    payloads: tuple[bytes, bytes]
    owner_pid: int = field(default_factory=os.getpid)

    @classmethod
    def parse(cls, raw: bytes) -> Segment:
        """Takes the bytes of a segment apart."""
        magic, version, order, size, pid, begun, state = START.unpack_from(raw, 0)
        assert (magic, version, order) == (b"MBWEIGHT", LAYOUT_VERSION, BYTE_ORDER)
        assert (size, begun, state) == (len(raw), start_of(pid), OPEN)
        generation, writing, *rest = WEIGHTS.unpack_from(raw, 64)
        first, second, json_at, json_size, entries_at, n_entries, payload_size, *payload_at = rest
        entries = []
        for i in range(n_entries):
            name, kind, n_dims, *ne, offset, n_bytes = ENTRY.unpack_from(raw, entries_at + 128 * i)
            assert ne[n_dims:] == [1] * (4 - n_dims)
            text = name.rstrip(b"\0").decode()
            entries.append(Entry(text, kind, tuple(ne[:n_dims]), offset, n_bytes))
        a, b = (raw[at : at + payload_size] for at in payload_at)
        text = raw[json_at : json_at + json_size].decode()
        return cls(generation, writing, (first, second), text, entries, (a, b), pid)

    def pack(self) -> bytes:
        """The bytes of such a segment."""
        directory = b"".join(
            ENTRY.pack(
                entry.name.encode(),
                entry.type,
                len(entry.ne),
                *(entry.ne + (1,) * (4 - len(entry.ne))),
                entry.offset,
                entry.n_bytes,
            )
            for entry in self.entries
        )
        text = self.json.encode()
        json_at = 256 + len(directory)
        first = (json_at + len(text) + 63) // 64 * 64
        payload_size = len(self.payloads[0])
        places = (first, first + payload_size)
        changing = (self.generation, self.writing, *self.digests)
        header = WEIGHTS.pack(
            *changing, json_at, len(text), 256, len(self.entries), payload_size, *places
        )
        body = header + directory + text
        body += bytes(first - 64 - len(body)) + b"".join(self.payloads)
        start = START.pack(
            b"MBWEIGHT",
            LAYOUT_VERSION,
            BYTE_ORDER,
            64 + len(body),
            self.owner_pid,
            start_of(self.owner_pid),
            OPEN,
        )
        return start + body
