"""The jinja2 filters chat templates may use.

HARMLESS filters give nothing much larger than what they take. BOUNDED ones could, so they are ours
and check first. Every other filter is unknown to a template, which is a clear error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.utils import pass_context

from modularbase.bases.template_meter import METER
from modularbase.errors import ChatTemplateError

HARMLESS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "select", "selectattr", "sort", "string", "title", "trim", "unique"),
    *("upper", "wordcount"),
)

_MAX_INDENT = 64
_MAX_DIGITS = 30


def _limited(name: str, value: object, largest: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= largest:
        raise ChatTemplateError(f"{name}: expected 0..{largest}, found {value!r}")
    return value


def tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: not escaped for HTML, unlike jinja2's own filter."""
    meter = METER.get()
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else _limited("tojson(indent)", indent, _MAX_INDENT),
        separators=separators,
        sort_keys=sort_keys,
    )
    return "".join(map(str, meter.kept(encoder.iterencode(value))))


@pass_context
def join(
    context: Context, value: Iterable[object], d: str = "", attribute: str | int | None = None
) -> str:
    """Joins texts with d between them."""
    meter = METER.get()
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    texts = [item if isinstance(item, str) else str(item) for item in meter.kept(value)]
    meter.check_size(sum(map(len, texts)) + len(texts) * len(d))
    return d.join(texts)


def replace(value: object, old: str, new: str, count: int = -1) -> str:
    """Replaces old by new."""
    text = str(value)
    METER.get().check_replace(text, old, new)
    return text.replace(old, new, count)


def indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Indents all lines, or all but the first; empty lines only if blank."""
    text = str(value)
    space = width if isinstance(width, str) else " " * _limited("indent", width, _MAX_INDENT)
    METER.get().check_size(len(text) + (text.count("\n") + 1) * len(space))
    lines = text.split("\n")
    indented = [space + line if line or blank else line for line in lines[1:]]
    return "\n".join([space + lines[0] if first else lines[0], *indented])


def rounded(value: float, precision: int = 0) -> float:
    """Rounds to some digits."""
    return round(float(value), _limited("round", precision, _MAX_DIGITS))


def safe(value: Any) -> Any:
    """Nothing is escaped in a prompt, so nothing needs to be marked as safe."""
    return value


BOUNDED: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "indent": indent,
        "join": join,
        "replace": replace,
        "round": rounded,
        "safe": safe,
        "tojson": tojson,
    }
)
