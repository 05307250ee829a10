"""How people name packs: `python_code`, `python_code@1.0.0`, `python_code@>=1,<2`."""

from __future__ import annotations

from pydantic import ValidationError

from modularbase.errors import InvalidRequestError
from modularbase.packs.manifest import PackRequirement


def bare_name(text: str) -> str:
    """The id, where no version is asked for: what the name comes to mean will do; else ""."""
    requirement = parse_spec(text)
    return "" if requirement.version else requirement.id


def parse_spec(text: str) -> PackRequirement:
    """Reads the name of a pack.

    Raises:
        InvalidRequestError: No id, or no version or specifier behind the @.
    """
    pack_id, at, version = text.partition("@")
    try:
        if at and not version.strip():
            raise ValueError
        return PackRequirement(id=pack_id.strip(), version=version)
    except (ValidationError, ValueError) as error:
        expected = "ID, ID@VERSION or ID@SPECIFIERS, such as python_code@>=1,<2"
        raise InvalidRequestError("pack", expected, repr(text)) from error
