"""`modularbase demo live`: a trainer's process beside the engine, and what is left of both."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modularbase.cli import demo_live, live_screen
from modularbase.cli.live_view import JsonView, LiveRow
from modularbase.errors import TrainingError
from modularbase.training import trainer_process
from modularbase.training.live_protocol import LiveOptions
from modularbase.training.trainer_process import TrainerProcess
from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.training.segment_bytes import shm_file


@pytest.fixture
def base(tiny_model: TinyModelFactory) -> Path:
    """A base that learns in seconds."""
    return tiny_model().path


@pytest.fixture
def channel() -> str:
    """A name that no other process has."""
    return f"pytest-live-{os.getpid()}"


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[TrainerProcess]:
    """The trainers that the command starts: fake ones."""
    started: list[TrainerProcess] = []

    class Recorded(TrainerProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    def fake_command(options: LiveOptions) -> list[str]:
        return [sys.executable, "-m", "tests.tools.fake_trainer", options.to_json()]

    monkeypatch.setattr(demo_live, "TrainerProcess", Recorded)
    monkeypatch.setattr(demo_live, "trainer_command", fake_command)
    return started


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All places where a program might leave something, and the working directory."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "cwd"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def seen(folder: Path) -> dict[Path, int]:
    """Files and folders, with the time of their last change: a file that came and went shows."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def when_answered(monkeypatch: pytest.MonkeyPatch, generation: int, act: Any) -> None:
    """Does something as soon as a generation has answered."""
    real = JsonView.answered

    def answered(self: JsonView, row: LiveRow) -> None:
        real(self, row)
        if row.generation >= generation:
            act()

    monkeypatch.setattr(JsonView, "answered", answered)


def test_a_pack_learns_while_it_is_served(cli: Cli, base: Path, channel: str, places: Path) -> None:
    before = seen(places)
    shown = cli(
        *("demo", "live", "--base", base, "--steps", 9, "--publishes", 3),
        *("--channel", channel, "--json"),
    )
    assert shown.code == 0, shown.err
    assert seen(places) == before
    assert not shm_file(channel).exists()
    assert f"engine: process {os.getpid()}" in shown.err  # this one, all the time
    rows = [json.loads(line) for line in shown.out.splitlines()]
    generations = [row["generation"] for row in rows]
    assert generations[0] == 0 and generations[-1] == 3 and generations == sorted(set(generations))
    assert rows[-1]["step"] == rows[-1]["n_steps"] == 9
    first, last = rows[0], rows[-1]
    assert last["perplexity"] < 0.5 * first["perplexity"]
    assert last["question"] == "Linux error ENOTTY means" and last["n_questions"] == 20
    assert first["first_token_ms"] is None
    assert all(row["first_token_ms"] is None or row["first_token_ms"] > 0 for row in rows)
    tokens = [row["other_tokens"] for row in rows]
    assert tokens == sorted(set(tokens))  # the other user got some between any two


def test_ctrl_c_leaves_nothing(
    cli: Cli,
    base: Path,
    channel: str,
    trainers: list[TrainerProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    when_answered(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    # So many generations that the trainer is not through by then.
    arguments = ("--base", base, "--channel", channel, "--publishes", 99999, "--json")
    assert cli("demo", "live", *arguments).code == 130
    assert not shm_file(channel).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(trainers[0].pid, 0)


def test_a_killed_trainer_is_told(
    cli: Cli,
    base: Path,
    channel: str,
    trainers: list[TrainerProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill() -> None:
        assert shm_file(channel).exists()
        os.kill(trainers[0].pid, signal.SIGKILL)

    when_answered(monkeypatch, 1, kill)
    arguments = ("--base", base, "--channel", channel, "--publishes", 99999, "--json")
    shown = cli("demo", "live", *arguments)
    assert shown.code == 1
    assert "the trainer's process was killed by signal 9" in shown.err
    assert not shm_file(channel).exists()


def test_the_terminal_is_split_in_two(
    cli: Cli,
    base: Path,
    channel: str,
    trainers: list[TrainerProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=110, height=40)
    monkeypatch.setattr(demo_live, "out", terminal)
    monkeypatch.setattr(live_screen, "out", terminal)
    shown = cli("demo", "live", "--base", base, "--channel", channel, "--publishes", 3)
    assert shown.code == 0, shown.err
    assert isinstance(terminal.file, io.StringIO)
    last = terminal.file.getvalue().split("trainer, process")[-1]
    for text in ("step", "3 of 3", "100 tokens/s", "Linux error ENOTTY", "another user", "▁"):
        assert text in last


def test_lines_without_a_terminal(
    cli: Cli, base: Path, channel: str, trainers: list[TrainerProcess]
) -> None:
    shown = cli("demo", "live", "--base", base, "--channel", channel, "--publishes", 1)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert [line.split("generation")[1].split()[0] for line in lines] == ["0", "1"]
    assert "0 of 20 right" in lines[0]


def test_a_trainer_that_cannot_begin_says_why(channel: str) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with (
        TrainerProcess(command, channel) as trainer,
        pytest.raises(TrainingError, match=r"ended with code 1: no such thing"),
    ):
        trainer.wait_open()


def test_a_trainer_that_does_not_end_is_killed(
    channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_process, "_CLOSE_S", 0.1)
    with TrainerProcess([sys.executable, "-c", "import time; time.sleep(600)"], channel) as trainer:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(trainer.pid, 0)


def test_steps_must_suffice_for_the_publishes(cli: Cli, base: Path) -> None:
    shown = cli("demo", "live", "--base", base, "--steps", 5, "--publishes", 6)
    assert (shown.code, shown.out) == (2, "") and "steps: expected 6 or more" in shown.err


def test_it_needs_the_extra(cli: Cli, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else real(name)
    )
    shown = cli("demo", "live", "--base", base)
    assert (shown.code, shown.out) == (1, "") and "modularbase[train]" in shown.err


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([1.0], "▁"), ([3.0, 2.0, 1.0], "█▅▁"), ([2.0] * 90, "▁" * 30)]
)
def test_losses_become_bars(values: list[float], bars: str) -> None:
    assert live_screen.sparkline(values) == bars
