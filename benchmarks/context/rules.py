"""Rules that a dialogue begins with, and facts in it, each with a check of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol


class Rule(Protocol):
    """Something that every answer must do."""

    @property
    def name(self) -> str:
        """As tables have it."""

    @property
    def instruction(self) -> str:
        """As the user says it."""

    def obeying(self, reply: str) -> str:
        """The reply, changed so that it obeys."""

    def is_obeyed(self, answer: str) -> bool:
        """Whether an answer obeys; an empty one never does."""


@dataclass(frozen=True)
class EndsWith:
    """Every answer ends with a word."""

    word: str
    name: str = "ends with a word"

    @property
    def instruction(self) -> str:
        """See Rule."""
        return f"End every answer with the word {self.word}."

    def obeying(self, reply: str) -> str:
        """See Rule."""
        return f"{reply} {self.word}"

    def is_obeyed(self, answer: str) -> bool:
        """See Rule."""
        words = _words(answer)
        return bool(words) and words[-1] == self.word.casefold()


@dataclass(frozen=True)
class BeginsWith:
    """Every answer begins with a word."""

    word: str
    name: str = "begins with a word"

    @property
    def instruction(self) -> str:
        """See Rule."""
        return f"Begin every answer with the word {self.word}."

    def obeying(self, reply: str) -> str:
        """See Rule."""
        return f"{self.word}, {reply}"

    def is_obeyed(self, answer: str) -> bool:
        """See Rule."""
        words = _words(answer)
        return bool(words) and words[0] == self.word.casefold()


@dataclass(frozen=True)
class LowerCase:
    """No capital letter is in any answer."""

    name: str = "lower case"
    instruction: str = "Write every answer in lower case only."

    def obeying(self, reply: str) -> str:
        """See Rule."""
        return reply.lower()

    def is_obeyed(self, answer: str) -> bool:
        """See Rule."""
        return answer.islower()


@dataclass(frozen=True)
class NeverSays:
    """A word is in no answer.

    Attributes:
        word: The one.
        instead: What scripted replies say in its place.
    """

    word: str
    instead: str
    name: str = "never says a word"

    @property
    def instruction(self) -> str:
        """See Rule."""
        return f"Never use the word {self.word} in an answer, say {self.instead} instead."

    def obeying(self, reply: str) -> str:
        """See Rule."""
        return re.sub(rf"\b{re.escape(self.word)}\b", self.instead, reply, flags=re.IGNORECASE)

    def is_obeyed(self, answer: str) -> bool:
        """See Rule."""
        words = _words(answer)
        return bool(words) and self.word.casefold() not in words


@dataclass(frozen=True)
class Fact:
    """Something said once that is asked for later.

    Attributes:
        statement: As the user says it.
        question: Asks for it.
        value: What an answer must contain, in any case of letters.
    """

    statement: str
    question: str
    value: str

    @property
    def reply(self) -> str:
        """A right answer."""
        return f"It is {self.value}."

    def is_known(self, answer: str) -> bool:
        """Whether the value is in an answer, as whole words."""
        found = re.search(rf"(?<!\w){re.escape(self.value)}(?!\w)", answer, flags=re.IGNORECASE)
        return found is not None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
