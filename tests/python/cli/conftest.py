"""Runs the command line in this process, as its entry point does."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from modularbase.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: object
    out: str
    err: str


class Cli(Protocol):
    """Runs `modularbase` with arguments."""

    def __call__(self, *arguments: object, stdin: bytes = ...) -> Outcome: ...


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs commands with a data folder of the test's own."""
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["modularbase", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Outcome(ended.value.code, *capsys.readouterr())

    return run
