"""Encoding and decoding beyond the published cases: special tokens, bad files, any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocab import tiny_byte_level_metadata

from modularbase.bases.tokenizer import Tokenizer
from modularbase.errors import InvalidRequestError, TokenizerError

TINY = Tokenizer.from_metadata(tiny_byte_level_metadata())
UNICODE = st.text()  # never lone surrogates


@given(UNICODE)
def test_byte_level_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode_plain(text)) == text
    assert TINY.decode_with_special(TINY.encode(text)) == text


@settings(max_examples=50)
@given(text=UNICODE)
def test_sentence_piece_round_trip(sentence_piece: Tokenizer, text: str) -> None:
    # U+2581 is how SentencePiece writes a space, so it comes back as one.
    assert sentence_piece.decode(sentence_piece.encode_plain(text)) == text.replace("▁", " ")


@given(UNICODE)
def test_where_byte_level_tokens_begin(text: str) -> None:
    text = f"<|im_start|>{text}<|im_end|> hello"
    ids, starts = TINY.encode_chat_with_starts(text)
    assert ids == TINY.encode_chat(text)
    assert starts == sorted(starts) and len(starts) == len(ids)
    n_before = 0
    for token_id, start in zip(ids, starts, strict=True):
        # Its first byte lies in the character at `start`.
        n_bytes = len(text[:start].encode())
        assert n_bytes <= n_before < n_bytes + len(text[start].encode())
        n_before += len(TINY.token_bytes(token_id))


@settings(max_examples=50)
@given(text=UNICODE)
def test_where_sentence_piece_tokens_begin(sentence_piece: Tokenizer, text: str) -> None:
    ids, starts = sentence_piece.encode_chat_with_starts(text)
    assert ids == sentence_piece.encode_chat(text)
    assert starts == sorted(starts) and len(starts) == len(ids)
    for token_id, start, end in zip(ids[1:], starts[1:], [*starts, len(text)][2:], strict=True):
        piece = sentence_piece.decode_continuation([token_id])
        if "\ufffd" not in piece and start < end:  # a whole character or more
            assert piece.lstrip() in text[start:end].replace("▁", " ")


def test_starts_know_what_the_tokenizer_adds(byte_level_metadata: dict[str, object]) -> None:
    byte_level_metadata["tokenizer.ggml.add_bos_token"] = True
    byte_level_metadata["tokenizer.ggml.add_eos_token"] = True
    byte_level_metadata["tokenizer.ggml.add_space_prefix"] = True  # SentencePiece's alone
    tokenizer = Tokenizer.from_metadata(byte_level_metadata)
    hello = TINY.encode_plain("hello")
    assert tokenizer.encode_chat_with_starts("hello") == ([1, *hello, 2], [0, 0, 5])
    given = "<|im_start|>hello<|im_end|>"
    assert tokenizer.encode_chat_with_starts(given) == ([1, *hello, 2], [0, 12, 17])
    assert tokenizer.encode_chat_with_starts("") == ([1, 2], [0, 0])
    assert tokenizer.encode_with_starts("hello") == ([1, *hello, 2], [0, 0, 5])
    assert tokenizer.encode_with_starts(given) == ([1, 1, *hello, 2, 2], [0, 0, 12, 17, 27])
    assert tokenizer.encode_with_starts(given)[0] == tokenizer.encode(given)
    assert tokenizer.encode_continuation_with_starts("hello") == (hello, [0])


def test_control_tokens_count_in_prompts_only() -> None:
    text = "<|im_start|>hello<|im_end|>"
    ids = TINY.encode(text)
    assert ids[0] == 1 and ids[-1] == 2 and len(ids) == 3
    assert TINY.decode(ids) == "hello"
    assert TINY.decode_with_special(ids) == text
    plain = TINY.encode_plain(text)
    assert not {1, 2} & set(plain)
    assert TINY.decode(plain) == text


def test_adjacent_and_only_special_tokens() -> None:
    assert TINY.encode("<|im_end|><|im_end|>") == [2, 2]
    assert TINY.encode("") == []


def test_bos_and_eos_as_the_file_says(byte_level_metadata: dict[str, object]) -> None:
    byte_level_metadata["tokenizer.ggml.add_bos_token"] = True
    byte_level_metadata["tokenizer.ggml.add_eos_token"] = True
    tokenizer = Tokenizer.from_metadata(byte_level_metadata)
    hello = TINY.encode_plain("hello")
    assert tokenizer.encode("hello") == [1, *hello, 2]
    assert tokenizer.encode_plain("hello") == hello
    assert tokenizer.encode("") == [1, 2]
    assert tokenizer.encode("<|im_start|>hello") == [1, 1, *hello, 2]
    assert tokenizer.encode_chat("<|im_start|>hello<|im_end|>") == [1, *hello, 2]
    assert tokenizer.encode_chat("hello") == [1, *hello, 2]


def test_sentence_piece_space_prefix(sentence_piece: Tokenizer) -> None:
    ids = sentence_piece.encode("Hello")
    assert ids[0] == sentence_piece.bos_id == 1
    assert sentence_piece.token_bytes(ids[1]) == b" Hello"
    assert sentence_piece.decode(ids) == "Hello"
    assert sentence_piece.decode_continuation(ids) == " Hello"
    # llama.cpp puts the prefix after a special token too.
    assert sentence_piece.encode_plain("Hello") == sentence_piece.encode("</s>Hello")[2:]


def test_tokens_that_end_a_generation() -> None:
    # <|endoftext|> ends it by name, <|im_end|> as the file's EOS.
    assert TINY.eog_ids == {0, 2}
    assert TINY.eot_id == 2
    assert (TINY.bos_id, TINY.eos_id) == (1, 2)


def test_end_by_name_overrides_the_declared_type(byte_level_metadata: dict[str, object]) -> None:
    types = byte_level_metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    types[2] = 1  # files exist that declare <|im_end|> as normal text
    tokenizer = Tokenizer.from_metadata(byte_level_metadata)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2]) == ""


def test_harmony_end_is_no_end(byte_level_metadata: dict[str, object]) -> None:
    tokens = byte_level_metadata["tokenizer.ggml.tokens"]
    types = byte_level_metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    tokens += ["<|end|>", "<|return|>", "<|call|>"]
    types += [3, 3, 3]
    tokenizer = Tokenizer.from_metadata(byte_level_metadata)
    end, returned, call = (tokens.index(t) for t in ("<|end|>", "<|return|>", "<|call|>"))
    assert {returned, call} <= tokenizer.eog_ids and end not in tokenizer.eog_ids
    assert tokenizer.decode([end]) == "<|end|>"


def test_token_bytes_are_exact(byte_level_metadata: dict[str, object]) -> None:
    tokens = byte_level_metadata["tokenizer.ggml.tokens"]
    types = byte_level_metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    tokens += [b"\xff\xfe", "", "[PAD]"]
    types += [1, 1, 5]
    tokenizer = Tokenizer.from_metadata(byte_level_metadata)
    n = tokenizer.n_vocab
    assert [tokenizer.token_bytes(n - i) for i in (3, 2)] == [b"\xff\xfe", b""]
    assert tokenizer.token_bytes(3) == b"\x00" and tokenizer.token_bytes(3 + 255) == b"\xff"
    assert tokenizer.decode([n - 3]) == "\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode(f"[BYTES_{n - 3}]")) == f"[BYTES_{n - 3}]"


@pytest.mark.parametrize("token_id", [-1, TINY.n_vocab, 10**12])
def test_unknown_ids_are_refused(token_id: int) -> None:
    for call in (TINY.token_bytes, TINY.is_control):
        with pytest.raises(TokenizerError, match=str(token_id)):
            call(token_id)
    with pytest.raises(TokenizerError):
        TINY.decode([token_id])


@pytest.mark.parametrize("text", [None, 7, b"bytes", ["a"], "a\ud800b"])
def test_what_is_not_text_is_refused(text: object) -> None:
    for encode in (TINY.encode, TINY.encode_plain, TINY.encode_chat):
        with pytest.raises(InvalidRequestError):
            encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("model", None, "model"),
        ("model", "bert", "model"),
        ("pre", None, "pre"),
        ("pre", "no-such-rules", "pre"),
        ("tokens", None, "tokens"),
        ("tokens", [], "tokens"),
        ("tokens", "abc", "tokens"),
        ("tokens", ["a", 1], "tokens[1]"),
        ("tokens", ["a", "a"], "tokens"),
        ("token_type", [1, 1], "token_type"),
        ("token_type", ["x"], "token_type"),
        ("merges", None, "merges"),
        ("merges", ["nospace"], "merges"),
        ("merges", ["zz yy"], "merges"),
        ("merges", [b"\xff \xfe"], "merges"),
        ("bos_token_id", 10**6, "bos_token_id"),
        ("bos_token_id", -1, "bos_token_id"),
        ("eos_token_id", "x", "eos_token_id"),
        ("eos_token_id", True, "eos_token_id"),
        ("add_bos_token", 1, "add_bos_token"),
    ],
)
def test_bad_metadata_is_named(
    byte_level_metadata: dict[str, object], key: str, value: object, field: str
) -> None:
    byte_level_metadata["tokenizer.ggml." + key] = value
    if value is None:
        del byte_level_metadata["tokenizer.ggml." + key]
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_metadata(byte_level_metadata)
    assert caught.value.field == "tokenizer.ggml." + field


def test_bos_wanted_but_unknown(byte_level_metadata: dict[str, object]) -> None:
    del byte_level_metadata["tokenizer.ggml.bos_token_id"]
    byte_level_metadata["tokenizer.ggml.add_bos_token"] = True
    with pytest.raises(TokenizerError, match="bos_token_id"):
        Tokenizer.from_metadata(byte_level_metadata)


def test_sentence_piece_needs_scores() -> None:
    meta = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"]}
    with pytest.raises(TokenizerError, match="scores"):
        Tokenizer.from_metadata(meta)
