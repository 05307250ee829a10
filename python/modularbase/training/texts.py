"""Training text: files and folders read into documents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modularbase.errors import InvalidRequestError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".html", ".csv", ".tsv")
"""What is taken from a folder; a file that is named itself may have any name."""


@dataclass(frozen=True, slots=True)
class Document:
    """Something to learn from.

    Attributes:
        text: What is learnt.
        prompt: What was asked, where the text is the answer: it is seen, and not learnt.
    """

    text: str
    prompt: str | None = None


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """All documents, in an order that depends on names alone.

    A .jsonl file has a document a line, as a project's data/README.md says; any other file is one.

    Raises:
        InvalidRequestError: A path that is not there, no UTF-8, or lines that are no documents.
    """
    files = (file for path in paths for file in _files(path))
    return [document for file in files for document in _documents(file) if document.text]


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        yield from (file for file in found if file.is_file())
    else:
        yield path


def _documents(file: Path) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError("data", "a file", f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError("data", "UTF-8 text", f"{file}: {error.reason}") from error
    if file.suffix != ".jsonl":
        yield Document(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _row(line, f"{file}, line {number}")


def _row(line: str, place: str) -> Document:
    expected = "an object with 'text', or with 'prompt' and 'response'"
    try:
        row = json.loads(line)
        parts = (row["text"],) if "text" in row else (row["response"], row["prompt"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError("data", expected, f"{place}: {error}") from error
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRequestError("data", expected, f"{place}: values that are no text")
    return Document(*parts)
