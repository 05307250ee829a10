"""An engine's tap: what its steps see, for another process to learn from."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, Protocol

from modularbase.errors import InvalidRequestError

RowType = Literal["f16", "f32"]

_NUMBERS: dict[RowType, int] = {"f32": 0, "f16": 1}  # ggml's


def row_type_number(name: str) -> int:
    """What the runtime calls a row type.

    Raises:
        InvalidRequestError: There is none of this name.
    """
    for known, number in _NUMBERS.items():
        if known == name:
            return number
    raise InvalidRequestError("row_type", " or ".join(map(repr, _NUMBERS)), repr(name))


class _CoreTap(Protocol):
    """The extension's tap, which only the engine sees as what it is."""

    @property
    def layer(self) -> int: ...
    @property
    def notice(self) -> str: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def n_pushed(self) -> int: ...
    @property
    def n_dropped(self) -> int: ...
    def last_error(self) -> str: ...
    def close(self) -> None: ...


class Tap:
    """Puts every row that enters a layer into a ring, until it is closed; see `Engine.tap`.

    It never holds up the engine. A full ring drops rows; a ring that cannot be used any more closes
    the tap, and `last_error` says why. Use it as a context manager, or call `close`.

    Attributes:
        channel: Name of the ring, for `modularbase.training.channel.ActivationRing`.
        layer: Whose entering rows it takes.
        notice: What a killed process had left under this name, and this one removed; else empty.
    """

    def __init__(self, channel: str, core: _CoreTap) -> None:
        """Use `Engine.tap`."""
        self._core = core
        self.channel = channel
        self.layer: int = core.layer
        self.notice: str = core.notice

    def __enter__(self) -> Tap:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the tap."""
        self.close()

    @property
    def is_open(self) -> bool:
        """Whether rows still come; not after `close`, an error, or the engine's end."""
        return self._core.is_open

    @property
    def n_pushed(self) -> int:
        """Rows that were put in."""
        return self._core.n_pushed

    @property
    def n_dropped(self) -> int:
        """Rows that found the ring full."""
        return self._core.n_dropped

    @property
    def last_error(self) -> str | None:
        """Why the tap closed itself; None where it did not."""
        return self._core.last_error() or None

    def close(self) -> None:
        """Removes the ring's name; a consumer keeps what is in. Closing twice is fine."""
        self._core.close()
