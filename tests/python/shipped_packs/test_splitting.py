"""What is measured on is nowhere in what is trained on."""

from __future__ import annotations

import re
import string
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from packs.recipes import Document
from packs.splitting import Split, excerpt, split

LINES = st.text(alphabet="abc 12.,", max_size=30).map(lambda line: line + "\n")
TEXTS = st.lists(LINES, max_size=8).map("".join)
UNITS: tuple[Literal["line"], Literal["paragraph"]] = ("line", "paragraph")


def letters(text: str) -> str:
    return re.sub(f"[{string.punctuation}{string.digits}\\s]", "", text)


def documents(texts: list[str]) -> list[Document]:
    return [Document(f"document {number}", text) for number, text in enumerate(texts)]


def measured(found: Split) -> list[Document]:
    return [*found.heldout, *found.test]


@given(st.lists(TEXTS, max_size=30))
def test_no_line_that_is_measured_on_is_trained_on(texts: list[str]) -> None:
    found = split(documents(texts), share=0.3, unit="line")
    known = {letters(line) for document in measured(found) for line in document.text.splitlines()}
    telling = {line for line in known if len(line) >= 12}
    for document in found.train:
        assert not telling & {letters(line) for line in document.text.splitlines()}


def test_a_line_that_differs_in_digits_only_is_the_same() -> None:
    texts = [f"V0{number}.1 Pedestrian injured in a collision\n" for number in range(10)]
    texts += [f"{name * 15} of the knee\n" for name in "abcdefghij"]
    found = split(documents(texts), share=0.25, unit="line")
    assert found.test and found.heldout and found.train
    parts = (found.train, found.heldout, found.test)
    assert sum(any("Pedestrian" in d.text for d in part) for part in parts) == 1


def test_paragraphs_are_compared_as_a_whole() -> None:
    shared = (
        "def area(width, height):\n    return scaled(width) * scaled(height) / number_of_parts\n"
    )
    texts = [f"{name * 70}\n\n{shared}\n{name.upper() * 70}\n" for name in "abcdefghijklmnop"]
    found = split(documents(texts), share=0.2, unit="paragraph")
    assert found.train and found.test
    assert not any(shared in document.text for document in found.train)
    assert all(re.match(r"(\w)\1{69}\n\n", document.text) for document in found.train)


@given(st.lists(TEXTS, min_size=1, max_size=20), st.sampled_from(UNITS))
def test_a_further_document_moves_no_other(
    texts: list[str], unit: Literal["line", "paragraph"]
) -> None:
    def names(found: list[str]) -> list[set[str]]:
        parts = split(documents(found), share=0.2, unit=unit)
        return [{d.name for d in part} for part in (parts.heldout, parts.test)]

    fewer, more = names(texts[:-1]), names(texts)
    last = f"document {len(texts) - 1}"
    assert [part - {last} for part in more] == fewer or any(last in part for part in more)


@given(st.lists(LINES, min_size=1, max_size=400).map("".join))
def test_an_excerpt_is_whole_lines_of_the_text(text: str) -> None:
    found = excerpt(Document("long", text)).text
    assert len(found) <= 4000
    assert found in text
    assert found == text or (f"\n{text}".count(f"\n{found}") and found.endswith("\n"))
