"""A run's folder: options, checkpoint, figures; everything needed to go on after a crash.

- options.json: what the run was told
- checkpoint.pt: weights, optimiser and counters; replaced all at once
- metrics.jsonl: a line for every step and every measurement
- tensorboard/: the same for TensorBoard
- curves.png: the same as a picture
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from modularbase.errors import InvalidRequestError
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.training.options import TrainOptions

RUNS_FOLDER = "runs"
_OPTIONS, _CHECKPOINT, _METRICS = "options.json", "checkpoint.pt", "metrics.jsonl"


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        """Use `create` or `latest`."""
        self.path = path

    @classmethod
    def create(cls, options: TrainOptions) -> RunFolder:
        """A new folder in the project's runs/, numbered.

        Raises:
            InstallError: It cannot be written.
        """
        runs = options.project / RUNS_FOLDER
        path = runs / f"fit-{max(_numbers(runs), default=0) + 1:03d}"
        with disk_errors(path.name, path):
            path.mkdir(parents=True)
            (path / _OPTIONS).write_text(options.to_json(), encoding="utf-8")
        return cls(path)

    @classmethod
    def latest(cls, project: Path) -> RunFolder:
        """The project's newest run.

        Raises:
            InvalidRequestError: It has none.
        """
        numbers = _numbers(project / RUNS_FOLDER)
        if not numbers:
            raise InvalidRequestError("project", "one with a run to resume", str(project))
        return cls(project / RUNS_FOLDER / f"fit-{max(numbers):03d}")

    @property
    def curves(self) -> Path:
        """Where the picture lies."""
        return self.path / "curves.png"

    def options(self) -> TrainOptions:
        """What the run was told, for where its project lies now.

        Raises:
            InvalidRequestError: The file is missing or spoilt.
        """
        try:
            told = TrainOptions.from_json((self.path / _OPTIONS).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError("run", "a folder with options", str(error)) from error
        return told.moved_to(self.path.parents[1])

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint; a crash leaves the old one.

        Raises:
            InstallError: It cannot be written.
        """
        with appearing(self.path / _CHECKPOINT) as part:
            torch.save(dict(state), part)

    def load(self) -> dict[str, Any] | None:
        """The checkpoint on the CPU, or None where the run ended before the first.

        Raises:
            InvalidRequestError: It is spoilt.
        """
        path = self.path / _CHECKPOINT
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InvalidRequestError("checkpoint", "a sound one", f"{path}: {error}") from error
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; one that a crash cut off is left out."""
        path = self.path / _METRICS
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def measured(self) -> list[dict[str, Any]]:
        """The lines of measurements: the plain base's, then those of the pack."""
        return [row for row in self.metrics() if row["kind"] != "train"]

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that will be done again."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        with appearing(self.path / _METRICS) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


class RunLog:
    """Writes figures to metrics.jsonl and to TensorBoard while a run goes on."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        """Opens both; steps from first_step on are new to TensorBoard."""
        self._metrics = (folder.path / _METRICS).open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> RunLog:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes both."""
        self._metrics.close()
        self._board.close()

    def write(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures of one kind: "train" or "heldout"."""
        self._metrics.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def _numbers(runs: Path) -> list[int]:
    tails = [path.name.removeprefix("fit-") for path in runs.glob("fit-*")]
    return [int(tail) for tail in tails if tail.isdecimal()]
