"""Long texts as tokens, from packages that ship them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

from benchmarks.paths import CACHE
from modularbase.context.signals import find_signals
from modularbase.training.encoding import Encoder
from modularbase.training.texts import Document as Text
from packs.obtaining import obtain
from packs.recipes import RECIPES, Document

KINDS = ("neutral", "python_code", "manual_pages")
"""Prose of documentation, source code and manuals, manual pages: in turn."""

_PACKAGES = CACHE / "packages"
_CHARS_A_TOKEN = (2, 12)  # within, so that the rest need not be tokenized
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][a-z]*(?:[,;]? [A-Za-z'-]+){5,40}\.")


@dataclass(frozen=True)
class LongText:
    """A text of as many tokens as were asked for.

    Attributes:
        name: Of the document in its package.
        ids: The base's opening token, if it has one, then the text's.
    """

    name: str
    ids: Sequence[int]


def long_texts(encoder: Encoder, n_texts: int, n_tokens: int) -> list[LongText]:
    """The same texts each time, of all kinds by turns.

    Raises:
        TextError: A package cannot be had.
    """
    by_kind = [_of_kind(kind, encoder, n_tokens) for kind in KINDS]
    found = (text for turn in zip_longest(*by_kind) for text in turn if text is not None)
    return list(islice(found, n_texts))


def plain_sentences() -> list[str]:
    """Prose of documents, in order, without what a grader would hold: rules, numbers, code.

    Raises:
        TextError: A package cannot be had.
    """
    documents = sorted(_documents("neutral", _PACKAGES), key=_place)
    return [
        sentence
        for document in documents
        for sentence in map(_on_one_line, _BETWEEN_SENTENCES.split(document.text))
        if _PROSE.fullmatch(sentence) and not find_signals(sentence)
    ]


def cut(name: str, text: str, encoder: Encoder, n_tokens: int) -> LongText | None:
    """The beginning of a text, or None where it is too short."""
    _, ids = encoder.encode(Text(text))
    whole = [*encoder.opening, *ids]
    return LongText(name, whole[:n_tokens]) if len(whole) >= n_tokens else None


def _of_kind(kind: str, encoder: Encoder, n_tokens: int) -> Iterator[LongText]:
    fewest, most = (n_chars * n_tokens for n_chars in _CHARS_A_TOKEN)
    for document in sorted(_documents(kind, _PACKAGES), key=_place):
        if len(document.text) >= fewest:
            found = cut(document.name, document.text[:most], encoder, n_tokens)
            if found is not None:
                yield found


def _documents(kind: str, packages: Path) -> Iterator[Document]:
    recipe = RECIPES[kind]
    folders = {source.name: obtain(source, packages.resolve()) for source in recipe.sources}
    return recipe.documents(folders)


def _place(document: Document) -> bytes:
    """An order that has nothing to do with what the names say."""
    return hashlib.sha256(document.name.encode()).digest()


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
