"""A checkpoint's tokenizer as GGUF metadata, checked by encoding with both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from modularbase.bases.checkpoints.fields import JsonFields
from modularbase.bases.merging import byte_level_splits, merges_from_scores
from modularbase.bases.pre_tokenizers import PRE_TOKENIZERS
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.tokenizer import Tokenizer
from modularbase.bases.vocab import Vocab
from modularbase.errors import BaseLoadError, TokenizerError

_KEY = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# Every way in which known pre-tokenizers differ: contractions, runs of digits, of spaces and of
# line ends, punctuation against letters, letters of other scripts, marks, emoji.
PROBE = (
    "Hello, World! I'm sure they'LL say \"it's\" fine; we'd've gone... x=1234567.89%\n\n"
    "def f(a_b, *c):\r\n\treturn a_b[0]  # 3.14e-10\n    \n   if x!=y: z+=1   \n"
    "CamelCase HTTPServer2 naïve Straße Zürich ÀÉÎ ñandú Привет мир 42 "
    "你好,世界!ひらがなカタカナ 한국어 العربية עברית हिन्दी ไทย 😀👍🏽 ½ ² "
    "<a href='http://x.org/?q=1&r=2'>~$`^|\\ a/b//c\n//\n--\t\t end"
)


def tokenizer_metadata(folder: Path, n_vocab: int, end_ids: Sequence[int]) -> dict[str, object]:
    """The `tokenizer.*` keys that make our tokenizer encode as the checkpoint's does.

    Args:
        folder: Of the checkpoint.
        n_vocab: Rows of the embedding; ids without a token get an unused one.
        end_ids: Tokens after which generation ends, beside those known by name.

    Raises:
        BaseLoadError: A file is missing or damaged, or of a kind the engine does not know.
    """
    file = JsonFields.read(folder / "tokenizer.json")
    model = file.child("model")
    if (kind := model.values.get("type", "BPE")) != "BPE":
        raise model.fault("type", "BPE", repr(kind))
    theirs = _their_tokenizer(file)
    special = _special_vocab(folder, n_vocab)
    tokens, types = _tokens(file, model, n_vocab)
    metadata: dict[str, object] = {
        _KEY + "tokens": tokens,
        _KEY + "token_type": types,
        _KEY + "add_bos_token": special.add_special_token.get("bos", False),
        _KEY + "add_eos_token": special.add_special_token.get("eos", False),
    }
    for name, key in _SPECIAL.items():
        if name in special.special_token_ids:
            metadata[f"{_KEY}{key}_token_id"] = special.special_token_ids[name]
    if model.flag("byte_fallback", False):
        metadata |= _sentence_piece(theirs, tokens, special.merges)
    else:
        metadata |= _byte_level(file, theirs, model, special.merges)
    if template := _chat_template(special.chat_template):
        metadata["tokenizer.chat_template"] = template
    vocab, ours = _our_tokenizer(file, metadata)
    if not vocab.is_byte_level:
        _compare_merges(model, vocab, special.merges)
    _compare(file, ours, theirs)
    return metadata | _further_ends(file, ours, end_ids)


def _their_tokenizer(file: JsonFields) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file.file))
    except Exception as error:  # the library raises plain Exception
        raise BaseLoadError(str(file.file), "file", "a tokenizer", str(error)) from error


def _our_tokenizer(file: JsonFields, metadata: Mapping[str, object]) -> tuple[Vocab, Tokenizer]:
    try:
        vocab = Vocab.from_metadata(metadata)
        return vocab, Tokenizer(vocab)
    except TokenizerError as error:
        raise BaseLoadError(str(file.file), error.field, error.expected, error.found) from error


def _special_vocab(folder: Path, n_vocab: int) -> Any:
    log = logging.getLogger("gguf.vocab")
    level = log.level
    log.setLevel(logging.ERROR)  # what it warns of is compared below
    try:
        return gguf.SpecialVocab(folder, load_merges=True, n_vocab=n_vocab)
    except Exception as error:  # of whatever kind: it reads the files as they come
        expected = "those of a tokenizer"
        raise BaseLoadError(str(folder), "special tokens", expected, str(error)) from error
    finally:
        log.setLevel(level)


def _tokens(file: JsonFields, model: JsonFields, n_vocab: int) -> tuple[list[str], list[int]]:
    byte_tokens = model.flag("byte_fallback", False)
    unknown = model.values.get("unk_token")
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [int(TokenType.UNUSED)] * n_vocab

    def put(token_id: object, text: object, kind: TokenType) -> None:
        if type(token_id) is not int or not 0 <= token_id < n_vocab or not isinstance(text, str):
            found = f"{text!r} with {token_id!r}"
            raise file.fault("vocab", f"texts with ids below the embedding's {n_vocab} rows", found)
        tokens[token_id], types[token_id] = text, int(kind)

    for text, token_id in model.child("vocab").values.items():
        is_byte = byte_tokens and len(text) == 6 and text.startswith("<0x")
        put(token_id, text, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in file.values.get("added_tokens") or []:
        fields = JsonFields(file.file, added if isinstance(added, dict) else {}, "added_tokens.")
        kind = TokenType.CONTROL if fields.flag("special", False) else TokenType.USER_DEFINED
        if fields.values.get("content") == unknown and byte_tokens:
            kind = TokenType.UNKNOWN
        put(fields.values.get("id"), fields.values.get("content"), kind)
    return tokens, types


def _byte_level(
    file: JsonFields, theirs: tokenizers.Tokenizer, model: JsonFields, merges: list[str]
) -> dict[str, object]:
    normalizer = file.values.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise file.fault("normalizer", "none or NFC", normalizer)
    if theirs.pre_tokenizer is None:
        raise file.fault("pre_tokenizer", "one that splits into bytes", "none")
    expected = theirs.pre_tokenizer.pre_tokenize_str(PROBE)
    ignores_merges = model.flag("ignore_merges", False)
    for name, rules in PRE_TOKENIZERS.items():
        if rules.ignore_merges != ignores_merges:
            continue
        if byte_level_splits(rules).pre_tokenize_str(PROBE) == expected:
            return {_KEY + "model": "gpt2", _KEY + "pre": name, _KEY + "merges": merges}
    known = "one that splits a probe text as a pre-tokenizer the engine knows does"
    raise file.fault("pre_tokenizer", known, theirs.pre_tokenizer)


def _sentence_piece(
    theirs: tokenizers.Tokenizer, tokens: list[str], merges: list[str]
) -> dict[str, object]:
    """SentencePiece joins by scores; a piece's score here is the rank of its first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    letter = theirs.encode("a", add_special_tokens=False)
    return {
        _KEY + "model": "llama",
        _KEY + "pre": "default",
        _KEY + "scores": [-float(ranks.get(token, len(merges))) for token in tokens],
        _KEY + "add_space_prefix": letter.tokens[:1] != ["a"],
    }


def _chat_template(said: object) -> str | None:
    """The template, or of several the one that is called default."""
    if isinstance(said, list):
        entries = [entry for entry in said if isinstance(entry, dict)]
        said = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _further_ends(file: JsonFields, ours: Tokenizer, end_ids: Sequence[int]) -> dict[str, object]:
    further = [token_id for token_id in end_ids if token_id not in ours.eog_ids]
    keys = ("eot_token_id", "eom_token_id")  # what a GGUF file has a place for
    if len(further) > len(keys) or any(token_id >= ours.n_vocab for token_id in further):
        expected = f"at most {len(keys)} tokens of the vocabulary beside those known by name"
        place = str(file.file.with_name("generation_config.json"))
        raise BaseLoadError(place, "eos_token_id", expected, str(further))
    return {_KEY + key: token_id for key, token_id in zip(keys, further, strict=False)}


def _compare_merges(model: JsonFields, vocab: Vocab, merges: list[str]) -> None:
    """A vocabulary made from SentencePiece's has every way to split a piece among its merges."""
    ours = {" ".join(pair) for pair in merges_from_scores(vocab)}
    if missing := ours.difference(merges):
        found = f"{len(missing)} missing, such as {min(missing)!r}"
        raise model.fault("merges", "all pairs that give a piece, as SentencePiece has them", found)


def _compare(file: JsonFields, ours: Tokenizer, theirs: tokenizers.Tokenizer) -> None:
    expected, found = theirs.encode(PROBE, add_special_tokens=False).ids, ours.encode_plain(PROBE)
    if expected != found:
        place = next(
            (i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(found)),
        )
        wanted = f"token {place} of a probe text to be {expected[place : place + 1]}"
        raise file.fault("model", wanted, f"{found[place : place + 1]} by the engine's rules")
