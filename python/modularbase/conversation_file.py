"""A conversation as a file: what was said, and the keys and values that the engine keeps of it.

Bytes, in order: MAGIC; the length of the header, 8 bytes little-endian; the header, JSON; the bytes
of the blocks; the SHA-256 of all before it, 32 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modularbase.context.chat import ChatState
from modularbase.context.plan import GraderState
from modularbase.errors import ConversationFileError
from modularbase.storage.files import appearing

MAGIC = b"MBCONV\x00\x04"
_DIGEST_BYTES = 32


class Layout(BaseModel):
    """What decides which bytes a block has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv: str
    n_layer: int
    n_head_kv: int
    head_dim: int
    first_site: int
    detail_heads: list[tuple[int, int]]
    in_rows: bool


class Kept(BaseModel):
    """What the engine keeps, but for the blocks' bytes; fields as in its conversation images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: list[int]
    n_valid: int
    n_positions: int
    tiers: list[int]
    spans: list[tuple[int, int, int]]
    blocks: list[tuple[int, int, int, list[int]]]


class Header(BaseModel):
    """All of a file but the blocks' bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["modularbase conversation"] = "modularbase conversation"
    base_digest: str
    layout: Layout
    chat: ChatState
    grader: GraderState
    forgotten_tokens: int
    kept: Kept


def write_conversation(path: Path, header: Header, data: bytes) -> None:
    """Writes a file, all at once.

    Raises:
        InstallError: It cannot be written.
    """
    text = header.model_dump_json().encode()
    parts: Sequence[bytes] = (MAGIC, len(text).to_bytes(8, "little"), text, data)
    digest = hashlib.sha256()
    with appearing(path) as part, part.open("wb") as file:
        for piece in parts:
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())


def read_conversation(path: Path, base_digest: str, layout: Layout) -> tuple[Header, bytes]:
    """Reads a file for a base and an engine.

    Raises:
        ConversationFileError: It is none, damaged, or made with another base or kind of cache.
        FileNotFoundError: There is no such file.
    """

    def refuse(field: str, expected: str, found: str) -> ConversationFileError:
        return ConversationFileError(str(path), field, expected, found)

    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise refuse("magic", repr(MAGIC), repr(content[: len(MAGIC)]))
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise refuse("digest", hashlib.sha256(body).hexdigest(), digest.hex())
    begin = len(MAGIC) + 8
    end = begin + int.from_bytes(body[len(MAGIC) : begin], "little")
    try:
        header = Header.model_validate_json(body[begin:end])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "header"
        raise refuse(field, first["msg"], repr(first["input"])[:80]) from error
    if header.base_digest != base_digest:
        raise refuse("base_digest", base_digest, header.base_digest)
    if header.layout != layout:
        raise refuse("layout", layout.model_dump_json(), header.layout.model_dump_json())
    return header, body[end:]
