"""The trainer of `modularbase demo live` as its parent sees it; imports no torch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from modularbase.errors import ChannelError, TrainingError
from modularbase.training.channel import TensorSpec, WeightChannelWriter
from modularbase.training.live_protocol import LiveOptions, LiveReport

_CLOSE_S = 10.0  # it may be in the middle of a step
_WAIT_S = 0.1


def trainer_command(options: LiveOptions) -> list[str]:
    """How the trainer is started."""
    return [sys.executable, "-m", "modularbase.training.live_trainer", options.to_json()]


class TrainerProcess:
    """A trainer in a process of its own, which ends with this one; use it as a context manager."""

    def __init__(self, command: Sequence[str], channel: str) -> None:
        """Starts it.

        Args:
            command: As `trainer_command` gives it.
            channel: Which it publishes in; removed at the end whatever has happened to it.
        """
        self._channel = channel
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the parent, which then ends it
        )
        self._changed = threading.Condition()  # guards the three below
        self._reports: list[LiveReport] = []
        self._published: list[LiveReport] = []  # those in which a generation is told of first
        self._said: deque[str] = deque(maxlen=20)
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._read_reports, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def reports(self) -> list[LiveReport]:
        """All reports so far."""
        with self._changed:
            return self._reports.copy()

    @property
    def n_published(self) -> int:
        """The newest generation that it has told of; 0 before the first."""
        with self._changed:
            return len(self._published)

    def wait_open(self) -> None:
        """Waits for its first report: its channel is open then.

        Raises:
            TrainingError: It has ended.
        """
        self._wait(lambda: len(self._reports) > 0)

    def wait_published(self, generation: int) -> LiveReport:
        """Waits until it has published a generation, and returns its report.

        Args:
            generation: Its number, from 1.

        Raises:
            TrainingError: It has ended.
        """
        self._wait(lambda: len(self._published) >= generation)
        return self._published[generation - 1]

    def check(self) -> None:
        """Says how it has ended, where it has.

        Raises:
            TrainingError: It has.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_WAIT_S)  # one that is just being killed
            raise TrainingError(self._end())

    def close(self) -> None:
        """Ends it, and removes what it may have left; closing twice is fine."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            code = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        if code != 0:
            self._remove_channel()

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self, is_over: Callable[[], bool]) -> None:
        while self._process.poll() is None:
            with self._changed:
                if is_over():
                    return
                self._changed.wait(_WAIT_S)
        raise TrainingError(self._end())

    def _end(self) -> str:
        for thread in self._threads:  # what it said last
            thread.join()
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        said = f": {self._said[-1]}" if self._said else ""
        return f"the trainer's process {how}{said}"

    def _read_reports(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = LiveReport.from_json(line)
            with self._changed:
                self._reports.append(report)
                if report.generation > len(self._published):
                    self._published.append(report)
                self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._changed:
                self._said.append(line.strip())

    def _remove_channel(self) -> None:
        """Takes over what a killed trainer left, and lets go of it; not what is somebody else's."""
        with contextlib.suppress(ChannelError):
            WeightChannelWriter(self._channel, [TensorSpec("none", "f32", (1,))]).close()
