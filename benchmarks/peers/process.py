"""Runs a peer's program and turns its failure into an error that shows what it said."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class PeerRunError(RuntimeError):
    """A peer's program failed, or printed something else than expected."""


def run(command: Sequence[str], timeout_s: float = 1800.0) -> str:
    """Runs a program to its end and returns what it wrote to standard output.

    Raises:
        PeerRunError: The program failed or ran too long.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PeerRunError(f"{' '.join(command)}: no end after {timeout_s:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-10:])
        raise PeerRunError(f"{' '.join(command)}: exit code {done.returncode}\n{tail}")
    return done.stdout


@dataclass(frozen=True)
class FirstOutput:
    """When a fresh process wrote its first byte, and the most memory it had used by then."""

    seconds: float
    peak_rss_bytes: int


def parse_peak_rss(status: str) -> int:
    """Returns the peak resident size from the text of /proc/PID/status, in bytes.

    Raises:
        PeerRunError: The text has no such field, as that of a process that has ended.
    """
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise PeerRunError("peak memory: the process ended before it could be read")


def time_first_output(command: Sequence[str], cwd: Path | None = None) -> FirstOutput:
    """Starts a process, waits for its first byte of output and lets it run to its end.

    The peak is read from /proc because ru_maxrss of a child begins at its parent's size.

    Raises:
        PeerRunError: The process failed or wrote nothing.
    """
    start = time.monotonic()
    with subprocess.Popen(
        list(command), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.monotonic() - start
        status = Path(f"/proc/{process.pid}/status").read_text() if first else ""
        _, stderr = process.communicate()
    if not first or process.returncode != 0:
        tail = "\n".join(stderr.decode(errors="replace").splitlines()[-10:])
        raise PeerRunError(f"{' '.join(command)}: exit code {process.returncode}\n{tail}")
    return FirstOutput(seconds, parse_peak_rss(status))
