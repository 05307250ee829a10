"""What the README tells to type works; `make demo` and `make test` are run by .ci/run itself."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
SNIPPETS = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, body in BLOCKS
    if language == "sh"
    for line in body.splitlines()
    if not line.startswith("make ")
]
BIN = Path(sys.executable).parent


def run(arguments: list[str], stdin: str = "") -> str:
    """The standard output of a command that succeeds."""
    done = subprocess.run(
        arguments, input=stdin, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet: str) -> None:
    assert "Paris" in run([sys.executable, "-c", snippet])


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    program, *arguments = shlex.split(command, comments=True)
    assert program.startswith(".venv/bin/")
    stdin = "Say hello.\n/exit\n" if arguments[0] == "chat" else ""
    assert run([str(BIN / Path(program).name), *arguments], stdin)


def test_readme_names_commands_and_code() -> None:
    assert SNIPPETS
    assert len(COMMANDS) >= 5
