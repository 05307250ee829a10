"""Ctrl-C and SIGTERM, which end a run behind its step, so that none is torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether somebody wants the run to end.

    Attributes:
        signal: The number of the signal that came; 0: none.
    """

    def __init__(self) -> None:
        """Nobody does yet."""
        self.signal = 0

    def take_effect(self) -> None:
        """Does what the signal asked for, if one came.

        Raises:
            KeyboardInterrupt: It was Ctrl-C.
            SystemExit: It was SIGTERM; the code is what shells show for it.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal:
            raise SystemExit(128 + self.signal)


@contextmanager
def interruptions() -> Iterator[Interruption]:
    """Notes a signal instead of acting on it; a second one takes effect at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread may have handlers; it gets the signals itself
        return

    def handle(number: int, frame: FrameType | None) -> None:
        is_second = interruption.signal != 0
        interruption.signal = number
        if is_second:
            interruption.take_effect()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
