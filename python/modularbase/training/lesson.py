"""What `modularbase demo live` teaches: the system's table of errors, which needs no download.

These are facts learnt by heart, in the words in which they are asked; a base of 135M parameters
knows next to none of them. `reworded` asks in words that are never trained on.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """An error and what it means.

    Attributes:
        name: Of the error, as C knows it.
        answer: What the C library says of it.
    """

    name: str
    answer: str

    @property
    def question(self) -> str:
        """What a pack is taught, and asked."""
        return f"Linux error {self.name} means"

    @property
    def reworded(self) -> str:
        """The same question in words that it is never trained on."""
        return f"The call failed, and errno was {self.name}:"

    @property
    def ending(self) -> str:
        """What comes behind either question."""
        return f" {self.answer}.\n"

    def is_answered_by(self, text: str) -> bool:
        """Whether a continuation of the question is the answer, and no more."""
        return text.strip().rstrip(".") == self.answer


def error_table() -> list[Fact]:
    """All errors, by number."""
    return [Fact(name, os.strerror(number)) for number, name in sorted(errno.errorcode.items())]
