"""Text to token ids and back, for any base whose GGUF file carries its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from tokenizers import Encoding

from modularbase.bases.merging import build_core
from modularbase.bases.special_tokens import TokenType
from modularbase.bases.vocab import SPACE_MARK, Vocab
from modularbase.errors import InvalidRequestError, TokenizerError

_WHITE_SPACE = " \t\n\v\f\r"
_HIDDEN = frozenset((TokenType.CONTROL, TokenType.UNKNOWN))


class Tokenizer:
    """Encodes and decodes as llama.cpp does for the same file. Immutable and thread-safe.

    Attributes:
        n_vocab: Number of tokens.
        bos_id: Beginning of sequence, or None.
        eos_id: End of sequence, or None.
        eot_id: End of a chat turn, or None.
        eog_ids: Every token after which generation ends.
    """

    def __init__(self, vocab: Vocab) -> None:
        """Use `from_metadata`."""
        self._vocab = vocab
        self._core = build_core(vocab)
        always = vocab.matched_ids([TokenType.USER_DEFINED])
        self._user_defined = _alternation(vocab, always)
        self._all_special = _alternation(vocab, [*always, *vocab.matched_ids(_HIDDEN)])
        self._bytes: dict[int, bytes] = {}
        self.n_vocab = len(vocab.tokens)
        self.bos_id = vocab.special.bos_id
        self.eos_id = vocab.special.eos_id
        self.eot_id = vocab.special.eot_id
        self.eog_ids = vocab.special.eog_ids

    @classmethod
    def from_metadata(cls, meta: Mapping[str, object]) -> Tokenizer:
        """Builds the tokenizer a GGUF file describes.

        Args:
            meta: The file's key-value pairs; token texts that are not UTF-8 may come as bytes.

        Raises:
            TokenizerError: The metadata is incomplete, contradictory, or of an unknown kind.
        """
        return cls(Vocab.from_metadata(meta))

    def encode(self, text: str) -> list[int]:
        """Encodes a prompt: special tokens in the text count, BOS/EOS are added as the file says.

        Raises:
            InvalidRequestError: Not a string, or not valid Unicode.
        """
        return self._enclose(self._encode(text, self._all_special))

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`; also where in the text each token begins, as in `encode_chat_with_starts`.

        Raises:
            InvalidRequestError: As `encode`.
        """
        ids, starts = self.encode_continuation_with_starts(text)
        if self._vocab.add_bos and self.bos_id is not None:
            starts = [0, *starts]
        ids = self._enclose(ids)
        return ids, starts + [len(text)] * (len(ids) - len(starts))

    def encode_chat(self, text: str) -> list[int]:
        """Encodes a rendered chat: as `encode`, but a BOS/EOS the template wrote is not doubled."""
        return self.encode_chat_with_starts(text)[0]

    def encode_chat_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_chat`; also where in the text each token begins.

        Returns:
            Token ids, and for each the index of the first character it takes part in: these never
            fall, and tokens of one character share theirs. An added EOS is at the end.
        """
        ids, starts = self.encode_continuation_with_starts(text)
        if self._vocab.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, starts = [self.bos_id, *ids], [0, *starts]
        if self._vocab.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids, starts = [*ids, self.eos_id], [*starts, len(text)]
        return ids, starts

    def encode_continuation_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_chat_with_starts`, for text behind other tokens: no BOS/EOS is added."""
        ids: list[int] = []
        starts: list[int] = []
        for start, found, n_prefix in self._encoded_fragments(text, self._all_special):
            if isinstance(found, int):
                ids.append(found)
                starts.append(start)
            else:
                ids += found.ids
                starts += [start + max(0, begin - n_prefix) for begin, _ in found.offsets]
        return ids, starts

    def encode_plain(self, text: str) -> list[int]:
        """Encodes text that must not act: no BOS/EOS, control tokens in it are mere characters."""
        return self._encode(text, self._user_defined)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` encode, without control tokens; what is not UTF-8 gives U+FFFD."""
        text = self.decode_continuation(ids)
        return text[1:] if self._vocab.add_space_prefix and text.startswith(" ") else text

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """As `decode`, for tokens that follow others: a leading space belongs to the text."""
        pieces = (b"" if self.is_control(i) else self.token_bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode_with_special(self, ids: Iterable[int]) -> str:
        """As `decode_continuation`, with the names of control tokens written out."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; of a control token, its name.

        Raises:
            TokenizerError: No such token.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._vocab.bytes_of(self._checked(token_id))
        return known

    def is_control(self, token_id: int) -> bool:
        """Whether the token acts instead of standing for text (`decode` leaves it out)."""
        return self._vocab.types[self._checked(token_id)] in _HIDDEN

    def token_id(self, text: str) -> int | None:
        """Id of the token with exactly this name in the vocabulary, such as "<|im_end|>"."""
        return self._vocab.id_of.get(text)

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError("token id", f"0..{self.n_vocab - 1}", str(token_id))
        return token_id

    def _enclose(self, ids: list[int]) -> list[int]:
        if self._vocab.add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if self._vocab.add_eos and self.eos_id is not None:
            ids = [*ids, self.eos_id]
        return ids

    def _encode(self, text: str, special: re.Pattern[str] | None) -> list[int]:
        ids: list[int] = []
        for _, found, _ in self._encoded_fragments(text, special):
            ids += [found] if isinstance(found, int) else found.ids
        return ids

    def _encoded_fragments(
        self, text: str, special: re.Pattern[str] | None
    ) -> Iterator[tuple[int, Encoding | int, int]]:
        """Each fragment: where it begins, its encoding, and how many characters were put before."""
        if not isinstance(text, str):
            raise InvalidRequestError("text", "a string", type(text).__name__)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"a lone surrogate {text[error.start]!r}"
            raise InvalidRequestError("text", "valid Unicode", found) from error
        puts_space = self._vocab.add_space_prefix and not self._vocab.is_byte_level
        after_special = True  # SentencePiece also puts its space prefix after a special token
        for start, fragment in self._fragments(text, special):
            if isinstance(fragment, int):
                yield start, fragment, 0
            else:
                prefix = " " if after_special and puts_space else ""
                yield start, self._merge(fragment, prefix), len(prefix)
            after_special = isinstance(fragment, int)

    def _fragments(
        self, text: str, special: re.Pattern[str] | None
    ) -> Iterator[tuple[int, str | int]]:
        if special is None:
            if text:
                yield 0, text
            return
        pos = 0
        for match in special.finditer(text):
            if match.start() > pos:
                yield pos, text[pos : match.start()]
            token_id = self._vocab.id_of[match[0]]
            yield match.start(), token_id
            pos = max(match.end(), pos)
            if token_id in self._vocab.strips_after_special:
                pos += len(text) - pos - len(text[pos:].lstrip(_WHITE_SPACE))
        if pos < len(text):
            yield pos, text[pos:]

    def _merge(self, text: str, prefix: str) -> Encoding:
        if not self._vocab.is_byte_level:
            text = (prefix + text).replace(" ", SPACE_MARK)
        return self._core.encode(text, add_special_tokens=False)


def _alternation(vocab: Vocab, ids: list[int]) -> re.Pattern[str] | None:
    """A pattern that finds these tokens in text, the longest first."""
    names = sorted((vocab.tokens[i] for i in ids if i not in vocab.raw), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None
