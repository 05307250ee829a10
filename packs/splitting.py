"""Documents for training, for early stopping and for measuring, of which none repeats another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from packs.recipes import Document

# Shorter ones ("Other specified diseases", "return self") are common to all.
_TELLING_CHARS = {"line": 12, "paragraph": 60}

# What is measured on is taken from many documents, and a long one gives a part.
_EXCERPT_CHARS = 4000


@dataclass(frozen=True)
class Split:
    """The parts of a text."""

    train: Sequence[Document]
    heldout: Sequence[Document]
    test: Sequence[Document]


def split(
    documents: Sequence[Document], *, share: float, unit: Literal["paragraph", "line"]
) -> Split:
    """Divides documents by their names alone, so that other documents change nothing.

    Args:
        documents: All there are.
        share: Of them for `heldout`, and as many for `test`.
        unit: What training may not share with the other parts, letters and digits compared.

    Returns:
        Parts in an order that names decide, in which training lacks every line or paragraph that
        is also, but for digits and punctuation, in a document that is measured on.
    """
    ordered = sorted(documents, key=lambda document: _place(document.name))
    parts: dict[str, list[Document]] = {"test": [], "heldout": [], "train": []}
    for document in ordered:
        place = _place(document.name)
        part = "test" if place < share else "heldout" if place < 2 * share else "train"
        parts[part].append(document)
    test = set(_marks(parts["test"], unit))
    heldout = [_without(document, test, unit) for document in parts["heldout"]]
    known = test | set(_marks(parts["heldout"], unit))
    train = [_without(document, known, unit) for document in parts["train"]]
    return Split(
        list(_distinct(train)),
        list(map(excerpt, _filled(heldout))),
        list(map(excerpt, parts["test"])),
    )


def excerpt(document: Document) -> Document:
    """A document, or where it is long whole lines from a place in it that its name decides."""
    spare = len(document.text) - _EXCERPT_CHARS
    if spare <= 0:
        return document
    first = int(_place("part of " + document.name) * spare)
    first = document.text.rfind("\n", 0, first) + 1
    last = document.text.rfind("\n", first, first + _EXCERPT_CHARS) + 1
    return replace(document, text=document.text[first : last or first + _EXCERPT_CHARS])


def _without(document: Document, known: set[bytes], unit: str) -> Document:
    kept = [part for part in _parts(document.text, unit) if _mark(part, unit) not in known]
    return replace(document, text="".join(kept))


def _distinct(documents: Sequence[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in _filled(documents):
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _filled(documents: Sequence[Document]) -> Iterator[Document]:
    return (document for document in documents if document.text.strip())


def _marks(documents: Sequence[Document], unit: str) -> Iterator[bytes]:
    for document in documents:
        for part in _parts(document.text, unit):
            mark = _mark(part, unit)
            if mark is not None:
                yield mark


def _mark(part: str, unit: str) -> bytes | None:
    """What two parts share that differ in digits, punctuation and white space only."""
    letters = re.sub(r"[\W\d_]+", "", part).casefold()
    if len(letters) < _TELLING_CHARS[unit]:
        return None
    return hashlib.sha256(letters.encode()).digest()[:12]


def _parts(text: str, unit: str) -> list[str]:
    if unit == "line":
        return text.splitlines(keepends=True)
    return re.split(r"(?<=\n\n)(?=\S|\s)", text)


def _place(name: str) -> float:
    """A number from 0 to 1 for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
