"""Files of conversations that are damaged, cut, made up, or of something else: refused, no harm."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine, EngineOptions
from modularbase.context_types import ContextOptions, Tier
from modularbase.conversation import Conversation
from modularbase.conversation_file import MAGIC
from modularbase.errors import ConversationFileError
from modularbase.types import KvKind, Message
from tests.conftest import TinyModelFactory
from tests.python.conftest import CHAT_TEMPLATE
from tests.tools.gguf_edit import copy_gguf

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
CHATTER = "so many words about the weather and the garden and the long way home today "
DIGEST_BYTES = 32
N_CUTS = 40
N_FLIPS = 40

Change = Callable[[dict[str, Any]], object]


def load(model: Path, kv: KvKind = "tiered", **options: Any) -> Engine:
    given = EngineOptions(pack_budget_bytes=0, **options)
    return Engine.load(model, dtype="keep", n_threads=1, kv=kv, options=given)


@pytest.fixture(scope="module")
def talk(wide_model: Path) -> Iterator[Conversation]:
    """A conversation with tokens in every tier."""
    options = ContextOptions(max_fit_error=10.0)
    with load(wide_model) as engine, engine.conversation(context=options) as talk:
        message: Message = {"role": "user", "content": CHATTER * 8, "tier": "redundant"}
        talk.chat(message, **GREEDY)
        for _ in range(3):
            report = talk.chat(CHATTER * 4, **GREEDY).context
        assert report is not None and all(report.tokens[tier] for tier in Tier)
        yield talk


@pytest.fixture(scope="module")
def content(talk: Conversation, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Its file."""
    path = tmp_path_factory.mktemp("saved") / "talk.mbconv"
    talk.save(path)
    return path.read_bytes()


@pytest.fixture
def refused(talk: Conversation, tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    """Tries a file, which must be refused; afterwards the conversation is what it was."""

    def attempt(broken: bytes) -> str:
        path = tmp_path / "broken.mbconv"
        path.write_bytes(broken)
        with pytest.raises(ConversationFileError) as caught:
            talk.restore(path)
        return str(caught.value)

    before = (talk.messages, talk.token_ids, talk.context)
    yield attempt
    assert (talk.messages, talk.token_ids, talk.context) == before
    talk.save(tmp_path / "again.mbconv")
    with load_same(talk) as other:
        other.restore(tmp_path / "again.mbconv")
        assert other.context is None or other.token_ids == talk.token_ids


def load_same(talk: Conversation) -> Conversation:
    """A new conversation in the same engine."""
    return Conversation(talk._host, talk._options, talk._packs)


def rewritten(content: bytes, change: Change, data: Callable[[bytes], bytes] = bytes) -> bytes:
    """The file with another header or other blocks, and the digest that belongs to them."""
    begin = len(MAGIC) + 8
    end = begin + int.from_bytes(content[len(MAGIC) : begin], "little")
    header = json.loads(content[begin:end])
    change(header)
    text = json.dumps(header).encode()
    blocks = data(content[end:-DIGEST_BYTES])
    body = MAGIC + len(text).to_bytes(8, "little") + text + blocks
    return body + hashlib.sha256(body).digest()


def test_the_tool_of_these_tests_makes_files_that_can_be_read(
    talk: Conversation, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "same.mbconv"
    path.write_bytes(rewritten(content, lambda header: None))
    with load_same(talk) as other:
        other.restore(path)
        assert other.token_ids == talk.token_ids


def test_a_file_that_was_cut(refused: Callable[[bytes], str], content: bytes) -> None:
    draw = random.Random(1)
    begin = len(MAGIC) + 8
    end = begin + int.from_bytes(content[len(MAGIC) : begin], "little")
    edges = [0, 1, len(MAGIC), begin, end, len(content) - DIGEST_BYTES, len(content) - 1]
    for n in [*edges, *(draw.randrange(len(content)) for _ in range(N_CUTS))]:
        refused(content[:n])
    refused(content + b"\0")


def test_a_file_with_a_bit_changed(refused: Callable[[bytes], str], content: bytes) -> None:
    draw = random.Random(2)
    for at in [0, len(MAGIC), *(draw.randrange(len(content)) for _ in range(N_FLIPS))]:
        changed = bytearray(content)
        changed[at] ^= 1 << draw.randrange(8)
        refused(bytes(changed))


CHANGES: dict[str, Change] = {
    "format": lambda header: header.update(format="something else"),
    "base_digest": lambda header: header.update(base_digest="sha256:0"),
    "layout": lambda header: header["layout"].update(head_dim=64),
    "layout.kv": lambda header: header["layout"].update(kv=4),
    "unknown": lambda header: header.update(unknown=1),
    "chat": lambda header: header.pop("chat"),
    "n_valid": lambda header: header["kept"].update(n_valid=1 << 40),
    "negative": lambda header: header["kept"].update(n_valid=-1),
    "n_positions": lambda header: header["kept"].update(n_positions=65),
    "tiers": lambda header: header["kept"]["tiers"].pop(),
    "tier code": lambda header: header["kept"]["tiers"].__setitem__(0, 3),
    "no byte": lambda header: header["kept"]["tiers"].__setitem__(0, 256),
    "token": lambda header: header["kept"]["tokens"].__setitem__(0, 1 << 40),
    "span": lambda header: header["kept"]["spans"].append([0, 16, 1]),
    "long span": lambda header: header["kept"].update(spans=[[0, 1 << 30, 1]]),
    "block kind": lambda header: header["kept"]["blocks"][0].__setitem__(0, 4),
    "detail block": lambda header: header["kept"]["blocks"][0].__setitem__(0, 3),
    "block tier": lambda header: header["kept"]["blocks"][0].__setitem__(1, 3),
    "visible": lambda header: header["kept"]["blocks"][0].__setitem__(2, 1 << 64),
    "no position": lambda header: header["kept"]["blocks"][0].__setitem__(3, []),
    "position": lambda header: header["kept"]["blocks"][0][3].__setitem__(0, 1 << 20),
    "negative position": lambda header: header["kept"]["blocks"][0][3].__setitem__(0, -1),
    "fewer blocks": lambda header: header["kept"]["blocks"].pop(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_made_up(
    refused: Callable[[bytes], str], content: bytes, change: str
) -> None:
    refused(rewritten(content, CHANGES[change]))


def test_blocks_that_are_not_all_there(refused: Callable[[bytes], str], content: bytes) -> None:
    assert "bytes" in refused(rewritten(content, lambda header: None, lambda data: data[:-1]))
    assert "bytes" in refused(rewritten(content, lambda header: None, lambda data: data + b"\0"))
    assert "bytes" in refused(rewritten(content, lambda header: None, lambda data: b""))


def test_a_file_of_another_base(
    content: bytes, tiny_model: TinyModelFactory, tmp_path: Path
) -> None:
    path = tmp_path / "talk.mbconv"
    path.write_bytes(content)
    changes = {"tokenizer.chat_template": CHAT_TEMPLATE}
    model = copy_gguf(tiny_model("qwen3", seed=1).path, tmp_path / "other.gguf", changes=changes)
    with load(model) as engine, engine.conversation() as other:
        other.chat("hello", **GREEDY)
        before = (other.messages, other.token_ids)
        with pytest.raises(ConversationFileError, match="base_digest"):
            other.restore(path)
        assert (other.messages, other.token_ids) == before
        other.chat("still there?", **GREEDY)


@pytest.mark.parametrize(
    "options",
    [{"kv": "f16"}, {"kv": "q4_0"}, {"kv_detail_heads": ((1, 0),)}, {"attention": "reference"}],
)
def test_a_file_of_another_kind_of_cache(
    content: bytes, wide_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "talk.mbconv"
    path.write_bytes(content)
    with load(wide_model, **options) as engine, engine.conversation() as other:
        with pytest.raises(ConversationFileError, match="layout"):
            other.restore(path)
        assert other.messages == ()
