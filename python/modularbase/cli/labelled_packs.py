"""`--pack SPEC=TEXT`: packs, and text that each of them is for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from packaging.specifiers import SpecifierSet

from modularbase.errors import InvalidRequestError, PackNotFoundError
from modularbase.packs.inspection import check_pack
from modularbase.packs.manifest import PackRequirement
from modularbase.packs.router_file import RoutedPack
from modularbase.packs.spec import parse_spec
from modularbase.packs.store import PackStore

if TYPE_CHECKING:
    from modularbase.training.labelled_text import LabelledPack

LabelledPacks = Annotated[
    list[str],
    typer.Option(
        "--pack",
        "-k",
        metavar="PACK=TEXT",
        help="A pack (ID, ID@VERSION, or a .gguf with a slash) and a file or folder of text it is "
        "for; may be repeated, also for one pack.",
    ),
]


def parse_labelled(texts: Sequence[str]) -> tuple[LabelledPack, ...]:
    """The packs that several `--pack` name, each with all its text, in the order given.

    Raises:
        InvalidRequestError: One of them is not PACK=TEXT.
        PackNotFoundError: A pack without a version that is not installed.
        PackFormatError: A file that is no sound pack.
    """
    from modularbase.training.labelled_text import LabelledPack

    found: dict[str, LabelledPack] = {}
    for text in texts:
        spec, equals, path = text.rpartition("=")
        if not equals or not spec or not path:
            raise InvalidRequestError("--pack", "PACK=TEXT, such as medical=icd.txt", repr(text))
        known = found.get(spec)
        pack, file = (known.pack, known.file) if known else _pack(spec)
        before = known.paths if known else ()
        found[spec] = LabelledPack(pack, (*before, Path(path)), file)
    return tuple(found.values())


def _pack(spec: str) -> tuple[RoutedPack, Path | None]:
    """A pack's name and version, and its file where it is there."""
    if os.sep in spec:
        manifest = check_pack(Path(spec))
        return RoutedPack(manifest.id, manifest.version), Path(spec)
    requirement = parse_spec(spec)
    try:
        installed = PackStore().find(requirement)
    except PackNotFoundError:
        version = _exact_version(requirement)
        if version is None:
            raise
        return RoutedPack(requirement.id, version), None
    return RoutedPack(requirement.id, installed.manifest.version), installed.path


def _exact_version(requirement: PackRequirement) -> str | None:
    specifiers = list(SpecifierSet(requirement.version))
    is_exact = len(specifiers) == 1 and specifiers[0].operator == "=="
    return specifiers[0].version if is_exact else None
