"""Text that is labelled by the pack it is for, cut into pieces as long as requests are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modularbase.errors import InvalidRequestError
from modularbase.packs.router_file import MAX_PACKS, RoutedPack
from modularbase.training.encoding import Encoder
from modularbase.training.texts import Document, read_documents

_LEAST_SNIPPETS = 20  # of a label: a few to learn from, to calibrate with and to measure on


@dataclass(frozen=True, slots=True)
class LabelledPack:
    """A pack, and text it is for.

    Attributes:
        pack: Its name and version.
        paths: Files and folders of text.
        file: The pack file, where it is needed.
    """

    pack: RoutedPack
    paths: tuple[Path, ...]
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of text.

    Attributes:
        ids: Its tokens, from the start of a sequence on.
        label: Which of the packs it is for; their number where it is for none.
    """

    ids: list[int]
    label: int


def check_labelled(packs: Sequence[LabelledPack]) -> None:
    """Refuses lists of packs that a router cannot know.

    Raises:
        InvalidRequestError: None or too many, or one of them twice.
    """
    names = [labelled.pack.id for labelled in packs]
    if not 1 <= len(names) <= MAX_PACKS or len(set(names)) != len(names):
        expected = f"1 to {MAX_PACKS} packs, each once"
        raise InvalidRequestError("pack", expected, ", ".join(names) or "none")


def draw_snippets(
    packs: Sequence[LabelledPack],
    neutral: Sequence[Path],
    encoder: Encoder,
    *,
    most: int,
    n_tokens: tuple[int, int],
    seed: int,
) -> list[Snippet]:
    """Pieces of random lengths that do not overlap, at most `most` of each label.

    Args:
        packs: Packs with their text.
        neutral: Text that is for none of them.
        encoder: The base's.
        most: Pieces of a label.
        n_tokens: Shortest and longest piece.
        seed: Equal seeds draw the same.

    Raises:
        InvalidRequestError: Too little text of a label.
    """
    labels = [(labelled.pack.id, labelled.paths) for labelled in packs] + [("neutral", neutral)]
    found = []
    for label, (name, paths) in enumerate(labels):
        random = np.random.default_rng([seed, label])
        pieces = [
            piece
            for document in read_documents(paths)
            for piece in _cut(_asked(document, encoder), n_tokens, random)
        ]
        if len(pieces) < _LEAST_SNIPPETS:
            expected = f"text of {_LEAST_SNIPPETS} pieces of up to {n_tokens[1]} tokens"
            raise InvalidRequestError(f"text for {name}", expected, f"text of {len(pieces)}")
        chosen = random.permutation(len(pieces))[:most]
        found += [Snippet([*encoder.opening, *pieces[i]], label) for i in chosen]
    return found


def _asked(document: Document, encoder: Encoder) -> list[int]:
    """Tokens of what a request could be: the prompt, where there is one."""
    asked = document.text if document.prompt is None else document.prompt
    return encoder.tokenizer.encode_plain(asked)


def _cut(
    ids: Sequence[int], n_tokens: tuple[int, int], random: np.random.Generator
) -> Iterator[Sequence[int]]:
    least, most = n_tokens
    first = 0
    while len(ids) - first >= least:
        last = first + int(random.integers(least, most + 1))
        yield ids[first:last]
        first = last
