"""Finds in a text what must not be lost: rules, names, numbers, and what is written exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from modularbase.context import lexicons
from modularbase.context.lexicons import Lexicon

SignalKind: TypeAlias = Literal[
    "announcement",
    "rule",
    "instruction",
    "name",
    "fact",
    "number",
    "URL",
    "path",
    "identifier",
    "quotation",
    "setting",
    "proper name",
    "unknown script",
]

# What somebody tells the assistant; the rest is exact content, whoever says it.
TOLD: frozenset[SignalKind] = frozenset(
    ("announcement", "rule", "instruction", "name", "fact", "proper name", "unknown script")
)
# Not to be lost, but need not be kept to the bit.
WEAK: frozenset[SignalKind] = frozenset(("fact", "proper name", "unknown script"))

_CJK = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTERS = re.compile(r"[^\W\d_]")
_KNOWN_LETTERS = re.compile(rf"[a-zA-Z\u00aa-\u024f\u1e00-\u1eff{_CJK}]")


@dataclass(frozen=True, slots=True)
class Signal:
    """Something in a text that must not be lost."""

    kind: SignalKind
    words: str  # that gave it away


def _phrase(phrase: str) -> str:
    # Any apostrophe and any white space will do.
    parts = re.escape(phrase).replace(r"\*", r"\w*").replace("'", "['’]")  # noqa: RUF001
    return parts.replace(r"\ ", r"\s+")


def _phrases(listed: str) -> set[str]:
    return {phrase.strip() for phrase in listed.split(",")}


def _alternatives(lexicon: Lexicon) -> str:
    """A pattern for all phrases; Chinese has no spaces between words."""
    spaced = set().union(
        *(_phrases(text) for language, text in lexicon.items() if language != "zh")
    )
    longest_first = sorted(spaced, key=lambda phrase: (-len(phrase), phrase))
    words = rf"(?<![\w'’])(?:{'|'.join(map(_phrase, longest_first))})(?!\w)"  # noqa: RUF001
    chinese = sorted(_phrases(lexicon["zh"]) if "zh" in lexicon else (), key=len, reverse=True)
    return "|".join([words, *map(re.escape, chinese)])


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_SOFTENED = rf"(?:(?:{_alternatives(lexicons.SOFTENERS)})[\s,，]*)*"  # noqa: RUF001
_BEGIN = r"(?:^|(?<=[.!?:;。！？：；，,\n]))[\s\"'“„«(\-*•]*(?:(?:\d{1,3}|[a-z])[.)]\s*)?"  # noqa: RUF001
# What such words and a colon stand before is no setting either, but may be an instruction.
_SAYING = _compiled(
    rf"(?P<before>{_BEGIN}{_SOFTENED})(?:{_alternatives(lexicons.SAYINGS)})(?P<colon>[^,.!?:;\n]{{0,20}}:)?"
)
_PATTERNS: tuple[tuple[SignalKind, re.Pattern[str]], ...] = (
    ("announcement", _compiled(_alternatives(lexicons.ANNOUNCEMENTS))),
    ("rule", _compiled(_alternatives(lexicons.RULES))),
    (
        "instruction",
        _compiled(rf"{_BEGIN}{_SOFTENED}(?P<words>{_alternatives(lexicons.IMPERATIVES)})"),
    ),
    ("name", _compiled(_alternatives(lexicons.NAMES))),
    ("URL", _compiled(r"\b(?:[a-z][a-z0-9+.-]*://|www\.)\S+|[\w.+-]+@[\w-]+\.[\w.]+")),
    ("path", _compiled(r"(?<![\w/])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]*)*|\b[a-z]:\\[\w.\\-]+")),
    (
        "identifier",
        re.compile(
            r"`[^`\n]+`|\b[A-Za-z]+_\w+|\b[a-z]+[A-Z]\w*|\b\w+\(\)|(?<!\S)--?[a-zA-Z][\w-]*|"
            r"\b[A-Z]{2,}\b|\b\w+\.(?:py|js|ts|c|h|cpp|rs|go|java|json|ya?ml|toml|csv|txt|md|html?|pdf|sh|sql)\b"
        ),
    ),
    (
        "quotation",
        re.compile(
            r"\"[^\"\n]{1,200}\"|[“„][^”“\n]{1,200}[”“]|«[^»\n]{1,200}»|「[^」\n]{1,200}」|『[^』\n]{1,200}』|"
            r"(?<!\w)'[^'\n]{2,80}'(?!\w)|(?<!\w)[‘‚][^’‘\n]{2,80}[’‘](?!\w)"  # noqa: RUF001
        ),
    ),
    (
        "setting",
        _compiled(
            r"^[ \t]*(?:[-*•][ \t]+)?[\w][\w .()/-]{0,40}?[ \t]*(?::(?!//)|：)[ \t]*\S[^\n]*|"  # noqa: RUF001
            r"\b\w[\w.]*[ \t]*(?::=|==?|[<>]=?)[ \t]*[^\s=]\S*|\{[^{}\n]*:[^{}\n]*\}"
        ),
    ),
    ("number", re.compile(r"[$€£¥]?\d[\d.,:/' -]*(?:[%‰°€£¥$]|\s?[^\W\d_]{1,12})?")),
    ("number", _compiled(_alternatives(lexicons.NUMBERS))),
    (
        "number",
        re.compile(
            r"(?:[零〇一二两三四五六七八九十百千万亿半]*[零〇二两三四五六七八九十百千万亿半]|(?<=第)一)"
            r"(?:公斤|千克|克|斤|吨|米|公里|千米|厘米|毫米|升|毫升|元|块|美元|欧元|岁|点|月|号|日|年|周|星期|天|"
            r"小时|分钟|分|秒|度|次|人|位|页|章|句|字|百分|个|条|只|%)|(?:星期|周)[一二三四五六日天]"
        ),
    ),
    ("fact", _compiled(_alternatives(lexicons.FACTS))),
)
# German writes every noun with a capital.
_GERMAN = _compiled(r"\b(?:der|die|das|und|ist|ich|nicht|ein|eine|einen|mit|wir|sie|es|hier|zu)\b")
_PROPER_NAME = re.compile(r"[^\W\d_][,;]?\s(?P<name>[^\W\d_a-z]\w+)")
_LIST_MARKER = re.compile(r"^[ \t]*\(?(?:\d{1,3}|[a-zA-Z])[.)][ \t]+", re.MULTILINE)


@lru_cache(maxsize=4096)  # a conversation is graded anew after each turn
def find_signals(text: str) -> tuple[Signal, ...]:
    """The first signal of each kind, the weak ones last."""
    return tuple(_signals(text))


def _signals(text: str) -> Iterator[Signal]:
    said = _SAYING.sub(lambda found: found["before"] + ("it," if found["colon"] else "it"), text)
    for kind, pattern in _PATTERNS:
        # The numbers of a list's items say nothing.
        searched = _LIST_MARKER.sub("", said) if kind == "number" else said
        match = pattern.search(searched)
        if match is not None:
            words = match.groupdict().get("words") or match[0]
            yield Signal(kind, " ".join(words.split())[:40])
    if len(_GERMAN.findall(text)) < 2:
        names = (match["name"] for match in _PROPER_NAME.finditer(text))
        yield from (Signal("proper name", name) for name in names if name[0].isupper())
    if _is_unknown_script(text):
        yield Signal("unknown script", text.strip()[:20])


def _is_unknown_script(text: str) -> bool:
    """Whether most letters belong to languages that no lexicon knows."""
    n_letters = len(_LETTERS.findall(text))
    return n_letters > 2 * len(_KNOWN_LETTERS.findall(text))
