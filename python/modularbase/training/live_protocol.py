"""How the two processes of `modularbase demo live` talk: a line of JSON a message, no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOptions:
    """What the trainer is told, as its only argument.

    Attributes:
        base: GGUF file of the base.
        channel: Name of the channel it publishes in.
        end_s: When the training should be over, by the system's monotonic clock, which all
            processes share.
        n_publishes: Generations to publish, at even distances.
        n_steps: Steps of the optimiser; 0: as many as there is time for.
        seed: Of the pack's first weights and the order of the text.
    """

    base: Path
    channel: str
    end_s: float
    n_publishes: int = 30
    n_steps: int = 0
    seed: int = 0

    def to_json(self) -> str:
        """For `from_json` in the other process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> LiveOptions:
        """Takes what `to_json` made."""
        given = json.loads(text)
        return cls(**{**given, "base": Path(given["base"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReport:
    """Where the trainer is: a line when its channel is open, and one behind every step.

    Attributes:
        step: Steps done.
        n_steps: Steps to do.
        loss: Of the last step, in nats a token; None before the first.
        tokens_per_s: Of the last step.
        generation: The newest that is published; 0 before the first.
        published_at_s: When it was, by the same clock.
    """

    step: int
    n_steps: int
    loss: float | None = None
    tokens_per_s: float = 0.0
    generation: int = 0
    published_at_s: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether the training is over."""
        return self.step == self.n_steps

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> LiveReport:
        """Takes what `to_json` made."""
        return cls(**json.loads(line))


def end_with_stdin() -> None:
    """Ends this process, as SIGTERM does from now on, when nobody holds its stdin's other side.

    Either way blocks are left as by an exception, so that segments go.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    def watch() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handle)
    threading.Thread(target=watch, daemon=True).start()
