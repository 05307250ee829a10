"""States of a run's blocks from an engine in a process of its own, into the cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modularbase.errors import ChannelError, TrainingError
from modularbase.training import engine_process
from modularbase.training.channel import ActivationRing
from modularbase.training.state_cache import BlockIds, StateCache, States
from modularbase.training.states import entering_kind

_END_S = 10.0  # for a process to end by itself


@dataclass(frozen=True, slots=True)
class StateReport:
    """How far the engine is.

    Attributes:
        n_done: Blocks whose states are in the cache.
        n_blocks: Blocks of the run.
        folder: Where the cache lies.
        n_bytes: What the run's states take there.
        notice: What a killed process had left, and this one removed; else empty.
    """

    n_done: int
    n_blocks: int
    folder: Path
    n_bytes: int
    notice: str = ""


StateWatch = Callable[[StateReport], None]


@dataclass(frozen=True, slots=True)
class StateJob:
    """What is to be in the cache.

    Attributes:
        base: GGUF file.
        layer: Whose entering states.
        blocks: Of these token ids [n_blocks, block_tokens].
        n_threads: Of the engine; 0: one a core.
        channel: Name of the activation ring.
    """

    base: Path
    layer: int
    blocks: BlockIds
    n_threads: int
    channel: str


def channel_name(project: Path) -> str:
    """A project's own, so that its next run removes what a killed one left."""
    return f"fit-{hashlib.sha256(str(project.resolve()).encode()).hexdigest()[:16]}"


def fill_cache(cache: StateCache, job: StateJob, watch: StateWatch) -> None:
    """Computes what the cache does not have; starts no engine where it has everything.

    Args:
        cache: The base's; has room.
        job: What is needed.
        watch: Called behind every block.

    Raises:
        TrainingError: The engine cannot start, or ends.
        InstallError: The disk has no room.
        ChannelError: The ring cannot be used.
    """
    kind = entering_kind(job.layer)
    todo = job.blocks[~cache.has(kind, job.blocks)]
    n_blocks, n_bytes = len(job.blocks), len(job.blocks) * cache.file_bytes(job.blocks.shape[1])

    def report(n_left: int, notice: str = "") -> None:
        watch(StateReport(n_blocks - n_left, n_blocks, cache.folder, n_bytes, notice))

    report(len(todo))
    if not len(todo):
        return
    with _engine(job) as engine:
        report(len(todo), engine.notice)
        for i, rows in enumerate(engine.run(todo)):
            cache.store(kind, todo[i], rows)
            report(len(todo) - i - 1)


class _EngineProcess:
    """Who started the process: asks for blocks, and takes their states from the ring."""

    def __init__(self, process: subprocess.Popen[bytes], said: Any, job: StateJob) -> None:
        self._process, self._said = process, said
        self.notice = str(self._answer()["notice"])
        self._ring = ActivationRing(job.channel)

    def run(self, blocks: BlockIds) -> Iterator[States]:
        """Yields the states of each block; while one is taken, the engine computes the next."""
        self._ask(blocks[0])
        for i, block in enumerate(blocks):
            self._answer()
            if i + 1 < len(blocks):
                self._ask(blocks[i + 1])
            yield self._rows(block)

    def _ask(self, block: NDArray[np.int64]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(block.tolist()).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        facts: dict[str, Any] = json.loads(line)
        if "error" in facts:
            raise TrainingError(f"the engine process: {facts['error']}")
        return facts

    def _rows(self, block: NDArray[np.int64]) -> States:
        """The oldest block in the ring, which must be this one."""
        rows = np.empty((len(block), self._ring.n_embd), np.float16)
        n_taken = 0
        while n_taken < len(block):
            with self._ring.batch(len(block) - n_taken) as records:
                if len(records) == 0:  # the answer came, so all that will be there is there
                    raise TrainingError(f"the ring dropped {self._ring.n_dropped} states")
                _check(records, block, n_taken)
                rows[n_taken : n_taken + len(records)] = records["row"]
                n_taken += len(records)
        if not np.isfinite(rows).all():
            raise TrainingError(
                "the base's states are too large for F16; run without --from-engine"
            )
        return rows

    def _ended(self) -> TrainingError:
        code = self._process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return TrainingError(f"the engine process {how}{': ' + lines[-1] if lines else ''}")


@contextmanager
def _engine(job: StateJob) -> Iterator[_EngineProcess]:
    """Runs the process for the length of a block; it ends in all cases."""
    numbers = (job.layer, job.blocks.shape[1], job.n_threads)
    command = [sys.executable, "-m", engine_process.__name__, str(job.base), job.channel]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        try:
            yield _EngineProcess(process, said, job)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Closes its stdin, with which it ends; kills it where it does not."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # it ended before it had read everything
        process.stdin.close()
    process.stdout.close()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    finally:  # also where somebody presses Ctrl-C again
        process.kill()
        process.wait()


def _check(records: NDArray[np.void], block: NDArray[np.int64], first: int) -> None:
    last = first + len(records)
    is_this = (records["position"] == np.arange(first, last)).all()
    if not is_this or (records["token"] != block[first:last]).any():
        raise ChannelError("activations", "records", "the block that was asked for", "another")
