"""How long-running installation work reports where it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO

Stage = Literal["wait", "download", "unpack", "convert", "verify", "done"]


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """A step of an installation.

    Attributes:
        name: What is installed.
        stage: What is being done; "wait" is for another process that is installing.
        n_done: Bytes done in this stage.
        n_total: Bytes of this stage, or None if unknown.
    """

    name: str
    stage: Stage
    n_done: int = 0
    n_total: int | None = None


ProgressCallback = Callable[[InstallProgress], None]


def no_progress(step: InstallProgress) -> None:
    """Takes progress and says nothing."""


class StderrProgress:
    """Shows progress on stderr: one moving line on a terminal, else one line a stage."""

    _INTERVAL_S = 0.1

    def __init__(self, stream: TextIO | None = None) -> None:
        """Writes to stream, or to stderr."""
        self._stream = stream or sys.stderr
        self._shown_at_s = 0.0
        self._stage: Stage | None = None

    def __call__(self, step: InstallProgress) -> None:
        """Shows a step."""
        now_s = time.monotonic()
        is_new = step.stage != self._stage
        finished = step.stage == "done"
        moves = self._stream.isatty()
        if not is_new and not (moves and now_s - self._shown_at_s >= self._INTERVAL_S):
            return
        self._stage, self._shown_at_s = step.stage, now_s
        text = f"{step.name}: {step.stage}{_amount(step)}"
        self._stream.write(f"\r\x1b[K{text}" if moves else f"{text}\n")
        if moves and finished:
            self._stream.write("\n")
        self._stream.flush()


def _amount(step: InstallProgress) -> str:
    if step.n_total:
        return f" {step.n_done / 1e6:.0f} of {step.n_total / 1e6:.0f} MB"
    return f" {step.n_done / 1e6:.0f} MB" if step.n_done else ""
