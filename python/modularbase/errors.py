"""Every error this package raises, in Python and from C++.

The C++ core throws the same tree (cpp/modularbase/core/errors.h); the binding translates each
class to the one of the same name here and passes the fields by the names of the C++ members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

__all__ = [
    "BaseLoadError",
    "BaseNotFoundError",
    "BudgetExceededError",
    "CancelledError",
    "ChannelError",
    "ChatTemplateError",
    "ContextBudgetError",
    "ContextLengthError",
    "DependencyError",
    "DeviceError",
    "FileError",
    "HistoryError",
    "InstallError",
    "InstallFailure",
    "InvalidRequestError",
    "KvCacheFullError",
    "ModularBaseError",
    "PackFormatError",
    "PackIncompatibleError",
    "PackNotFoundError",
    "TeacherError",
    "TokenizerError",
    "TrainingError",
]

InstallFailure = Literal[
    "network",
    "not_found",
    "disk_full",
    "unwritable",
    "digest",
    "broken",
    "not_installed",
    "exists",
    "tool",
]
"""What kind of failure stopped an installation; `InstallError.kind` is one of these."""

_E = TypeVar("_E", bound="ModularBaseError")


class ModularBaseError(Exception):
    """Root of every error this library raises. Anything else that escapes is a bug."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Constructors take fields, not the message, so the default pickling would not rebuild them.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[_E], args: tuple[object, ...], fields: dict[str, object]) -> _E:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


class FileError(ModularBaseError):
    """A file that cannot be used; names the file, the field, what was expected and found."""

    def __init__(self, file: str, field: str, expected: str, found: str) -> None:
        super().__init__(f"{file}: {field}: expected {expected}, found {found}")
        self.file = file
        self.field = field
        self.expected = expected
        self.found = found


class BaseLoadError(FileError):
    """A base file that cannot be used."""


class InvalidRequestError(ModularBaseError, ValueError):
    """A request that makes no sense (negative temperature, empty prompt, token id out of range)."""

    def __init__(self, field: str, expected: str, found: str) -> None:
        super().__init__(f"{field}: expected {expected}, found {found}")
        self.field = field
        self.expected = expected
        self.found = found


class ContextLengthError(ModularBaseError):
    """Prompt plus requested tokens do not fit the context."""

    def __init__(self, n_tokens: int, n_ctx: int) -> None:
        super().__init__(f"the request needs {n_tokens} tokens of context, n_ctx is {n_ctx}")
        self.n_tokens = n_tokens
        self.n_ctx = n_ctx


class ContextBudgetError(ModularBaseError):
    """A context that cannot be kept in its budget without losing what must be kept.

    Attributes:
        needed_bytes: What it takes at least.
        budget_bytes: What it may take.
        by_cause: needed_bytes by what needs them ("rules", "system prompt", "window", ...).
    """

    def __init__(self, needed_bytes: int, budget_bytes: int, by_cause: Mapping[str, int]) -> None:
        causes = ", ".join(f"{cause} {n_bytes}" for cause, n_bytes in by_cause.items())
        super().__init__(
            f"the context needs {needed_bytes} bytes at least ({causes}), "
            f"the budget is {budget_bytes}"
        )
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.by_cause = dict(by_cause)


class KvCacheFullError(ModularBaseError):
    """The KV cache can never hold this request, however long it waits."""

    def __init__(self, needed_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the request needs {needed_bytes} bytes of KV cache, the limit is {limit_bytes}"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class CancelledError(ModularBaseError):
    """The request was cancelled by its owner or by the engine closing."""

    def __init__(self, message: str = "the request was cancelled") -> None:
        super().__init__(message)


class DeviceError(ModularBaseError):
    """The compute device is missing, out of memory, or failed."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class BaseNotFoundError(ModularBaseError, KeyError):
    """No base of this name; `known` lists the names there are."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(
            f"no base is named {name!r}; known bases: {', '.join(self.known) or 'none'} "
            "(a path to a GGUF file works too)"
        )

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class InstallError(ModularBaseError):
    """A base or pack could not be installed, removed or read from the data folder.

    Attributes:
        reason: What went wrong and, where there is one, the way out.
        kind: The class of failure, for programs.
        name: The base or pack, or None.
        source: Where it was to come from (a requirement or URL), or None.
        path: The file or folder concerned, or None.
    """

    def __init__(
        self,
        reason: str,
        kind: InstallFailure,
        name: str | None = None,
        source: str | None = None,
        path: str | None = None,
    ) -> None:
        where = "".join(
            f" [{label} {value}]" for label, value in (("from", source), ("at", path)) if value
        )
        super().__init__(f"{name + ': ' if name else ''}{reason}{where}")
        self.reason = reason
        self.kind = kind
        self.name = name
        self.source = source
        self.path = path


class PackFormatError(FileError):
    """A pack or manifest that cannot be used."""


class PackNotFoundError(ModularBaseError, KeyError):
    """No pack of this name in a version that suits; `known` lists those there are."""

    def __init__(self, pack_id: str, required: str, known: Iterable[str]) -> None:
        self.pack_id = pack_id
        self.required = required
        self.known = tuple(known)
        wanted = f"{pack_id} {required}" if required else pack_id
        super().__init__(f"no pack {wanted}; known packs: {', '.join(self.known) or 'none'}")

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class PackIncompatibleError(ModularBaseError):
    """A sound pack that does not go with this base."""

    def __init__(self, pack_id: str, field: str, required: str, found: str) -> None:
        super().__init__(f"pack {pack_id}: {field}: required {required}, found {found}")
        self.pack_id = pack_id
        self.field = field
        self.required = required
        self.found = found


class BudgetExceededError(ModularBaseError):
    """A pack found no place among the resident ones."""

    def __init__(self, pack_id: str, needed_bytes: int, budget_bytes: int, reason: str) -> None:
        super().__init__(
            f"pack {pack_id} needs {needed_bytes} bytes, the budget is {budget_bytes}: {reason}"
        )
        self.pack_id = pack_id
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.reason = reason


class ChannelError(ModularBaseError):
    """A shared-memory segment that cannot be made, or used."""

    def __init__(self, segment: str, field: str, expected: str, found: str) -> None:
        super().__init__(f"segment {segment}: {field}: expected {expected}, found {found}")
        self.segment = segment
        self.field = field
        self.expected = expected
        self.found = found


class ConversationFileError(FileError):
    """A saved conversation that cannot be used."""


class HistoryError(FileError):
    """A record of what users did that cannot be read or written."""


class DependencyError(ModularBaseError):
    """Packs that do not go together: unknown, of unsuitable versions, in conflict or a circle."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ChatTemplateError(ModularBaseError):
    """A chat template that is missing, malformed, refuses the messages, or exceeds its limits.

    Attributes:
        reason: What went wrong; the template's own words if it called `raise_exception`.
        line: Line of the template, where known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(f"chat template{f' (line {line})' if line is not None else ''}: {reason}")
        self.reason = reason
        self.line = line


class TokenizerError(ModularBaseError):
    """A tokenizer that cannot be built from the file's metadata, or token ids it does not have."""

    def __init__(self, field: str, expected: str, found: str) -> None:
        super().__init__(f"tokenizer: {field}: expected {expected}, found {found}")
        self.field = field
        self.expected = expected
        self.found = found


class TrainingError(ModularBaseError):
    """Training that cannot begin or go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TeacherError(TrainingError):
    """A teacher that cannot be asked, or does not answer as it should.

    Attributes:
        teacher: Its address or file.
        status: Of HTTP, if a server answered with an error.
    """

    def __init__(self, teacher: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"teacher {teacher}: {reason}")
        self.teacher = teacher
        self.status = status
