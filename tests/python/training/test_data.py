"""Text into blocks, and the order in which a run sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase.errors import ChatTemplateError, InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.training.data import Mixture, TokenBlocks, pack_blocks, split_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.texts import Document, read_documents
from tests.conftest import TinyModelFactory
from tests.tools.gguf_edit import copy_gguf

END = 257


@pytest.fixture(scope="module")
def encoder(chat_model: Path) -> Encoder:
    """Bytes, <|end|> as the end, and a template "[user]prompt\\n[a]"."""
    return Encoder(read_metadata(chat_model))


def test_documents_follow_each_other_behind_an_end(encoder: Encoder) -> None:
    blocks = pack_blocks([Document("abc"), Document("defg<|end|>")], encoder, 5)
    assert blocks.ids.shape == (3, 5)
    text = blocks.ids.flatten().tolist()
    assert text[3] == encoder.end_id == END  # and the one in the text is characters
    assert encoder.tokenizer.decode(text) == "abcdefg<|end|>"
    assert blocks.learnt.tolist() == [[False, *[True] * 4]] * 3


def test_of_an_answer_the_response_is_learnt(encoder: Encoder) -> None:
    documents = [Document("ab"), Document("yes", prompt="<q>"), Document("no", prompt="?")]
    blocks = pack_blocks(documents, encoder, 33)
    (ids,), (learnt,) = blocks.ids.tolist(), blocks.learnt.tolist()
    rest = encoder.tokenizer.decode_with_special(ids)
    assert rest == "ab<|end|>[user]<q>\n[a]yes<|end|>[user]?\n[a]no"
    told = [i for i, is_learnt in zip(ids, learnt, strict=True) if is_learnt]
    # Neither the first token nor a prompt; the end of a turn, which also parts two documents.
    assert encoder.tokenizer.decode_with_special(told) == "b<|end|>yes<|end|>no"
    assert blocks.n_learnt == 8


def test_a_block_with_nothing_to_learn_is_left_out(encoder: Encoder) -> None:
    blocks = pack_blocks([Document("yes", prompt="q" * 10)], encoder, 8)
    assert len(blocks) == 1  # of three
    assert encoder.tokenizer.decode_with_special(blocks.ids[0]) == "\n[a]yes<|end|>"


def test_a_base_without_template_takes_no_prompts(tiny_model: TinyModelFactory) -> None:
    encoder = Encoder(read_metadata(tiny_model().path))
    with pytest.raises(ChatTemplateError, match="made for chat"):
        pack_blocks([Document("yes", prompt="q")], encoder, 8)


def test_blocks_begin_as_the_base_expects(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 300,
    }
    path = copy_gguf(tiny_model().path, tmp_path / "bos.gguf", changes=changes)
    blocks = pack_blocks([Document("abcdefgh")], Encoder(read_metadata(path)), 5).ids
    assert blocks[:, 0].tolist() == [300, 300] and blocks[1, 1] == blocks[0, 1] + 4
    changes["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}"
    path = copy_gguf(tiny_model().path, tmp_path / "chat.gguf", changes=changes)
    blocks = pack_blocks([Document("xyz", prompt="abcde")], Encoder(read_metadata(path)), 5).ids
    assert (blocks == 300).sum() == len(blocks) == 1  # a BOS of the template is not doubled


def test_reads_files_folders_and_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89")
    (tmp_path / "rows").write_text("named")
    lines = tmp_path / "c.jsonl"
    lines.write_text('{"text": "x"}\n\n{"prompt": "p", "response": "r"}\n')
    plain = map(Document, ("first", "second", "x"))
    assert read_documents([tmp_path]) == [*plain, Document("r", prompt="p")]
    assert read_documents([tmp_path / "rows"]) == [Document("named")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"\xff", "UTF-8"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"prompt": "p"}', "line 2"),
        ("a.jsonl", b"[1]", "line 1"),
        ("a.jsonl", b'{"text": 1}', "line 1"),
        (None, b"", "missing.txt"),
    ],
)
def test_spoilt_text_is_refused(
    name: str | None, content: bytes, told: str, tmp_path: Path
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=told):
        read_documents([path])


def test_held_out_blocks_are_drawn_and_not_trained_on() -> None:
    blocks = TokenBlocks.of(np.arange(200, dtype=np.int64).reshape(100, 2))
    corpus = split_blocks(blocks, share=0.1, most=50, seed=1, kind="data")
    assert (len(corpus.train), len(corpus.heldout)) == (90, 10)
    together = np.concatenate([corpus.train.ids, corpus.heldout.ids])
    assert np.array_equal(np.sort(together, axis=0), blocks.ids)
    other = split_blocks(blocks, share=0.1, most=50, seed=2, kind="data")
    assert not np.array_equal(corpus.heldout.ids, other.heldout.ids)
    assert corpus.digest() != other.digest()
    assert len(split_blocks(blocks, share=0.9, most=50, seed=1, kind="data").heldout) == 50
    with pytest.raises(InvalidRequestError, match="neutral"):
        split_blocks(blocks[:1], share=0.1, most=50, seed=1, kind="neutral")


def test_the_order_depends_on_seed_and_step_alone() -> None:
    domain = column(range(10))
    neutral = column(range(100, 104))

    def batches(seed: int, steps: range) -> list[list[int]]:
        mixture = Mixture(domain, neutral, n_domain=3, n_neutral=1, seed=seed)
        found = [mixture.batch(step) for step in steps]
        return [[*b.domain.ids[:, 0].tolist(), *b.neutral.ids[:, 0].tolist()] for b in found]

    whole = batches(1, range(20))
    assert batches(1, range(7, 20)) == whole[7:]
    assert batches(2, range(20)) != whole
    seen = [block for batch in whole for block in batch[:3]]
    for epoch in range(6):  # every block once a pass, each pass in another order
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert sorted(batch[3] for batch in whole[:4]) == [100, 101, 102, 103]


@pytest.mark.parametrize("n_steps", [1, 3, 4, 9])
def test_what_a_run_uses_is_what_its_steps_draw(n_steps: int) -> None:
    blocks = TokenBlocks.of(np.arange(10, dtype=np.int64)[:, None])
    neutral = TokenBlocks.of(100 + np.arange(4, dtype=np.int64)[:, None])
    mixture = Mixture(blocks, neutral, n_domain=3, n_neutral=1, seed=1)
    batches = [mixture.batch(step) for step in range(n_steps)]
    used = mixture.used(n_steps)
    for kind in ("domain", "neutral"):
        drawn = {int(i) for batch in batches for i in getattr(batch, kind).ids[:, 0]}
        assert getattr(used, kind).ids[:, 0].tolist() == sorted(drawn)


def test_pieces_cover_a_step() -> None:
    blocks = column(range(10))
    batch = Mixture(blocks, column(range(100, 110)), n_domain=5, n_neutral=2, seed=0).batch(0)
    pieces = batch.pieces(3)
    assert [len(piece.domain) for piece in pieces] == [2, 2, 1]
    assert sum(piece.n_tokens for piece in pieces) == batch.n_tokens
    together = np.concatenate([piece.neutral.ids for piece in pieces])
    assert np.array_equal(together, batch.neutral.ids)


def column(ids: range) -> TokenBlocks:
    """Blocks of one token."""
    return TokenBlocks.of(np.asarray(ids, np.int64)[:, None])
