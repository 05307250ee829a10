"""What one rendering of a chat template may use, and the account of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from jinja2.utils import Namespace

from modularbase.errors import ChatTemplateError

_MAX_INT_BITS = 4096
_ITEM_SIZE = 32  # an element costs memory and time like this many characters
# Widths in format strings make text out of nothing; sizes of three digits are plenty.
_WIDE_FORMAT = re.compile(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")


@dataclass(slots=True)
class Meter:
    """The limits of one rendering.

    No value may outgrow `n_max`, so every single operation is short; the processor time is checked
    between operations.

    Attributes:
        cpu_s: Processor time.
        n_max: Size of any value, in characters.
    """

    cpu_s: float = 5.0
    n_max: int = 8_000_000
    _started_s: float = field(default_factory=time.thread_time)

    def tick(self) -> None:
        """Marks one operation.

        Raises:
            ChatTemplateError: The time is used up.
        """
        if time.thread_time() - self._started_s > self.cpu_s:
            raise ChatTemplateError(f"ran for more than {self.cpu_s:g} s; it may never end")

    def check_size(self, n: int) -> None:
        """Refuses a value of n characters, if possible before it is made.

        Raises:
            ChatTemplateError: It would be too large.
        """
        if n > self.n_max:
            raise ChatTemplateError(f"makes a value of more than {self.n_max} characters")

    def weigh(self, value: object) -> int:
        """Size of a value with all it contains; what is contained twice counts twice."""
        total = 0
        pending = [value]
        while pending:
            item = pending.pop()
            total += _ITEM_SIZE
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length() // 8
            elif isinstance(item, (list, tuple, set)):
                pending.extend(item)
            elif isinstance(item, Mapping):
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, Namespace):
                pending.append(object.__getattribute__(item, "_Namespace__attrs"))
            self.check_size(total + _ITEM_SIZE * len(pending))
        return total

    def kept(self, items: Iterable[object]) -> list[object]:
        """Makes a list of what an iterator yields, as long as it is small enough."""
        kept: list[object] = []
        total = 0
        for item in items:
            self.tick()
            total += self.weigh(item)
            self.check_size(total)
            kept.append(item)
        return kept

    def check_replace(self, text: str, old: str, new: str) -> None:
        """Refuses `text.replace(old, new)` if the result would be too large."""
        self.check_size(len(text) + text.count(old) * len(new))

    def check_format(self, template: str, values: object) -> None:
        """Refuses a format string (either style) whose result could be too large."""
        if _WIDE_FORMAT.search(template):
            raise ChatTemplateError(f"format string {template[:40]!r} asks for too wide a field")
        n_fields = template.count("%") + template.count("{")
        self.check_size(len(template) + n_fields * (1000 + self.weigh(values)))

    def check_binop(self, operator: str, left: object, right: object) -> None:
        """Refuses `left operator right` if the result would be too large."""
        self.tick()
        if isinstance(left, int) and isinstance(right, int):
            n_bits = left.bit_length() + right.bit_length()
            if operator == "**":
                n_bits = left.bit_length() * max(right, 1)
            if operator in ("*", "**") and n_bits > _MAX_INT_BITS:
                raise ChatTemplateError(f"makes a number of more than {_MAX_INT_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self.check_format(left, right)
        elif operator == "+":
            self.check_size(self.weigh(left) + self.weigh(right))
        elif operator == "*" and isinstance(right, int):
            self.check_size(max(right, 0) * self.weigh(left))
        elif operator == "*" and isinstance(left, int):
            self.check_size(max(left, 0) * self.weigh(right))


METER: ContextVar[Meter] = ContextVar("meter")
"""The meter of the rendering that runs in this context."""
