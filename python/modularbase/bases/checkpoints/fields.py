"""Typed values of a checkpoint's JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modularbase.errors import BaseLoadError


class JsonFields:
    """The fields of one JSON object; every refusal names the file and the field."""

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        """Takes the object as it was read.

        Args:
            file: Named in errors.
            values: The object.
            prefix: Where in the file it lies, such as "model.".
        """
        self.file = file
        self.values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> JsonFields:
        """Reads a file that holds one object.

        Raises:
            BaseLoadError: It is not there, or holds something else.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or "nothing there"
            raise BaseLoadError(str(file), "file", "a JSON file", reason) from error
        except (ValueError, RecursionError) as error:
            raise BaseLoadError(str(file), "file", "valid JSON", str(error)) from error
        if not isinstance(values, dict):
            raise BaseLoadError(str(file), "file", "a JSON object", type(values).__name__)
        return cls(file, values)

    def fault(self, name: str, expected: str, found: object) -> BaseLoadError:
        """The error that says what is wrong with a field."""
        return BaseLoadError(str(self.file), self._prefix + name, expected, str(found))

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer; where the field is absent or null, the default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise self.fault(name, "a positive integer", repr(value))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; where the field is absent or null, the default."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e38:
            raise self.fault(name, "a positive number", repr(value))
        return float(value)

    def text(self, name: str) -> str:
        """A string."""
        value = self._value(name, None)
        if not isinstance(value, str):
            raise self.fault(name, "a string", repr(value))
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; where the field is absent or null, the default."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, "true or false", repr(value))
        return value

    def child(self, name: str) -> JsonFields:
        """The object in a field; an empty one where the field is absent or null."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.fault(name, "an object", type(value).__name__)
        return JsonFields(self.file, value, f"{self._prefix}{name}.")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
