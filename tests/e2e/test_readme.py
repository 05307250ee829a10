"""What the README tells to type works; `make demo` and `make test` are run by .ci/run itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
SNIPPETS = [body for language, body in BLOCKS if language == "python"]
SHOWN = (
    "Paris",
    "id='medical', version='1.0.0'",
    "Tier.KEY",
)  # what each prints, among other things
COMMANDS = [
    line
    for language, body in BLOCKS
    if language == "sh"
    for line in body.splitlines()
    if not line.startswith("make ")
]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """Where the commands run: an empty folder, with a data folder of its own below it."""
    place = tmp_path_factory.mktemp("readme")
    bases = place / "home" / "bases" / "smollm2-135m"
    bases.parent.mkdir(parents=True)
    bases.symlink_to(smollm2.parent, target_is_directory=True)
    (place / "packs").symlink_to(README.parent / "packs", target_is_directory=True)
    return place


def run(arguments: list[str], folder: Path, stdin: str = "") -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(
        arguments,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
        env=os.environ | {"MODULARBASE_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# The commands come first: they install what the snippets use.
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command, comments=True)
    assert program.startswith(".venv/bin/")
    stdin = "Say hello.\n/exit\n" if arguments[0] == "chat" else ""
    assert run([str(BIN / Path(program).name), *arguments], folder, stdin)


@pytest.mark.parametrize(("snippet", "shown"), [*zip(SNIPPETS, SHOWN, strict=True)])
def test_snippet(snippet: str, shown: str, folder: Path) -> None:
    assert shown in run([sys.executable, "-c", snippet], folder)


def test_readme_names_commands_and_code() -> None:
    assert len(SNIPPETS) >= 2
    assert len(COMMANDS) >= 10
