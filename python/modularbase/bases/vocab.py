"""The vocabulary of a GGUF file: its metadata, checked, and the bytes behind each token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modularbase.bases.pre_tokenizers import PreTokenizer, pre_tokenizer
from modularbase.bases.special_tokens import SpecialTokens, TokenType, find_special_tokens
from modularbase.errors import TokenizerError

SPACE_MARK = "▁"  # U+2581, how SentencePiece writes a space

_KEY = "tokenizer.ggml."
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# SentencePiece files often leave these out; byte-level BPE files have no such custom.
_SPM_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


def byte_characters() -> list[str]:
    """The characters that stand for the bytes 0..255 in byte-level vocabularies."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


_BYTE_OF_CHARACTER = {character: bytes([i]) for i, character in enumerate(byte_characters())}


@dataclass(frozen=True, slots=True)
class Vocab:
    """A checked vocabulary.

    Attributes:
        is_byte_level: True for byte-level BPE ("gpt2"), False for SentencePiece ("llama").
        tokens: Token text by id.
        id_of: Token id by text.
        types: Token type by id, after corrections by name.
        scores: Token scores by id; empty for byte-level BPE.
        merges: Merge rules "left right" in order of rank; empty for SentencePiece.
        raw: Exact bytes of the tokens whose text is not UTF-8, by id.
        special: Special tokens.
        rules: Pre-tokenizer of a byte-level vocabulary.
        add_bos: Whether encoding begins with BOS.
        add_eos: Whether encoding ends with EOS.
        add_space_prefix: Whether encoding puts a space before the text.
        strips_after_special: Ids of special tokens that swallow the white space after them.
    """

    is_byte_level: bool
    tokens: list[str]
    id_of: dict[str, int]
    types: list[int]
    scores: list[float]
    merges: list[str]
    raw: Mapping[int, bytes]
    special: SpecialTokens
    rules: PreTokenizer
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips_after_special: frozenset[int]

    @classmethod
    def from_metadata(cls, meta: Mapping[str, object]) -> Vocab:
        """Reads and checks the `tokenizer.*` keys of a GGUF file.

        Raises:
            TokenizerError: A key is missing, of the wrong type, or contradicts another.
        """
        model = meta.get(_KEY + "model")
        if model not in ("gpt2", "llama"):
            raise TokenizerError(_KEY + "model", "'gpt2' or 'llama'", repr(model))
        is_byte_level = model == "gpt2"
        tokens, raw = _texts(_list(meta, "tokens"))
        id_of = {text: i for i, text in enumerate(tokens)}
        if len(id_of) != len(tokens):
            twice = next(text for i, text in enumerate(tokens) if id_of[text] != i)
            raise TokenizerError(_KEY + "tokens", "distinct tokens", f"{twice!r} more than once")
        special = find_special_tokens(meta, id_of, {} if is_byte_level else _SPM_DEFAULTS)
        types = _types(meta, len(tokens), special)
        rules = pre_tokenizer(_text(meta, "pre")) if is_byte_level else PreTokenizer(())
        vocab = cls(
            is_byte_level=is_byte_level,
            tokens=tokens,
            id_of=id_of,
            types=types,
            scores=[] if is_byte_level else _scores(meta, len(tokens)),
            merges=_merges(meta) if is_byte_level else [],
            raw=raw,
            special=special,
            rules=rules,
            add_bos=_flag(meta, "add_bos_token", rules.add_bos or not is_byte_level),
            add_eos=_flag(meta, "add_eos_token", False),
            add_space_prefix=_flag(meta, "add_space_prefix", not is_byte_level),
            strips_after_special=_stripping_tokens(meta, tokens, types),
        )
        for wanted, token_id, key in (
            (vocab.add_bos, special.bos_id, "bos_token_id"),
            (vocab.add_eos, special.eos_id, "eos_token_id"),
        ):
            if wanted and token_id is None:
                raise TokenizerError(_KEY + key, "an id, since encoding adds it", "nothing")
        return vocab

    def matched_ids(self, kinds: Iterable[TokenType]) -> list[int]:
        """Ids of the tokens of these types."""
        wanted = frozenset(map(int, kinds))
        return [i for i, kind in enumerate(self.types) if kind in wanted]

    def bytes_of(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; of a special token, its name."""
        if token_id in self.raw:
            return self.raw[token_id]
        text, kind = self.tokens[token_id], self.types[token_id]
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            return text.encode()
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if not self.is_byte_level:
            return text.replace(SPACE_MARK, " ").encode()
        return b"".join(_BYTE_OF_CHARACTER.get(c) or c.encode() for c in text)


def _list(meta: Mapping[str, object], name: str) -> list[object]:
    value = meta.get(_KEY + name)
    to_list = getattr(value, "tolist", None)  # the C++ reader gives numbers as arrays
    if to_list is not None:
        value = to_list()
    if not isinstance(value, (list, tuple)) or not value:
        raise TokenizerError(_KEY + name, "a list that is not empty", type(value).__name__)
    return list(value)


def _text(meta: Mapping[str, object], name: str) -> str:
    value = meta.get(_KEY + name)
    if not isinstance(value, str):
        raise TokenizerError(_KEY + name, "a string", repr(value))
    return value


def _flag(meta: Mapping[str, object], name: str, default: bool) -> bool:
    value = meta.get(_KEY + name, default)
    if not isinstance(value, bool):
        raise TokenizerError(_KEY + name, "a boolean", repr(value))
    return value


def _texts(items: list[object]) -> tuple[list[str], dict[int, bytes]]:
    tokens: list[str] = []
    raw: dict[int, bytes] = {}
    for i, item in enumerate(items):
        if isinstance(item, str) and item:
            tokens.append(item)
        elif isinstance(item, bytes) and item:
            raw[i] = item
            tokens.append(f"[BYTES_{i}]")  # a name only: no text can encode to it
        elif item in ("", b""):
            raw[i] = b""
            tokens.append(f"[EMPTY_{i}]")
        else:
            raise TokenizerError(f"{_KEY}tokens[{i}]", "a string", type(item).__name__)
    return tokens, raw


def _types(meta: Mapping[str, object], n_vocab: int, special: SpecialTokens) -> list[int]:
    if _KEY + "token_type" in meta:
        types = [kind for kind in _list(meta, "token_type") if isinstance(kind, int)]
        if len(types) != n_vocab:
            found = f"{len(types)} integers"
            raise TokenizerError(_KEY + "token_type", f"{n_vocab} integers", found)
    else:
        types = [int(TokenType.NORMAL)] * n_vocab
    for token_id, kind in special.types.items():
        types[token_id] = int(kind)
    return types


def _scores(meta: Mapping[str, object], n_vocab: int) -> list[float]:
    scores = [float(s) for s in _list(meta, "scores") if isinstance(s, (int, float))]
    if len(scores) != n_vocab:
        raise TokenizerError(_KEY + "scores", f"{n_vocab} numbers", f"{len(scores)} numbers")
    return scores


def _merges(meta: Mapping[str, object]) -> list[str]:
    merges = [merge for merge in _list(meta, "merges") if isinstance(merge, str)]
    n_items = len(_list(meta, "merges"))
    if len(merges) != n_items:
        raise TokenizerError(_KEY + "merges", f"{n_items} UTF-8 strings", f"only {len(merges)}")
    return merges


def _stripping_tokens(
    meta: Mapping[str, object], tokens: list[str], types: list[int]
) -> frozenset[int]:
    # GGUF has no field for this; Phi-3 was trained with it, so it goes by the model's name.
    name = str(meta.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    keep = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(
        i for i, text in enumerate(tokens) if types[i] in kinds and text not in keep
    ) | {i for i, text in enumerate(tokens) if text == "</s>"}
