"""Runs whose states an engine in another process computes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine
from modularbase.errors import TrainingError
from modularbase.gguf_file import read_metadata
from modularbase.training import engine_process
from modularbase.training.data import pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.engine_states import StateReport, channel_name
from modularbase.training.fit import StepReport, fit, resume
from modularbase.training.options import TrainOptions
from modularbase.training.run_folder import RunFolder
from modularbase.training.texts import read_documents
from modularbase.training.twin import Twin
from tests.conftest import TinyModelFactory
from tests.python.training.segment_bytes import shm_file
from tests.python.training.toy import make_project, toy_options

_SHORT: dict[str, Any] = {"steps": 4, "eval_every": 2, "save_every": 2, "heldout_blocks": 3}


@pytest.fixture
def options(
    tmp_path: Path, tiny_model: TinyModelFactory, monkeypatch: pytest.MonkeyPatch
) -> TrainOptions:
    """A very short run on a fresh project, with a cache of its own."""
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    model = tiny_model()
    make_project(tmp_path / "toy", model)
    return toy_options(tmp_path / "toy", model, from_engine=True, n_threads=1, **_SHORT)


def rows(options: TrainOptions, run: str) -> list[dict[str, Any]]:
    """A run's figures without times."""
    found = RunFolder(options.project / "runs" / run).metrics()
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in found]


def state_files(options: TrainOptions) -> list[Path]:
    """What the cache has."""
    return sorted((options.project.parent / "home" / "states").glob("*/*.npy"))


def engines(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The engine processes that are started from now on."""
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def behind_block(n: int, act: Callable[[], None]) -> Callable[[StateReport], None]:
    """A watch that does something behind the n-th block."""
    seen: list[int] = []

    def watch(report: StateReport) -> None:
        seen.append(report.n_done)
        if len(seen) == n + 2:  # two reports come before the first block
            act()

    return watch


def test_losses_are_those_of_the_plain_run_and_torch_runs_no_lower_half(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(replace(options, from_engine=False))

    def refuse(self: Twin, ids: Any) -> None:
        raise AssertionError("torch ran the lower half")

    monkeypatch.setattr(Twin, "enter", refuse)
    seen: list[StateReport] = []
    fit(options, state_watch=seen.append)
    plain, ours = rows(options, "fit-001"), rows(options, "fit-002")
    assert [row["step"] for row in ours] == [row["step"] for row in plain]
    for expected, found in zip(plain, ours, strict=True):
        # The engine caches keys and values in F16, and states come as F16: 11 bits each. Steps
        # magnify that, since an expert that is chosen or not is no matter of degree.
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["neutral_kl"] == pytest.approx(expected["neutral_kl"], rel=0.05, abs=1e-5)
    n_domain, n_neutral = 4 * options.n_domain + 3, 4 * options.n_neutral + 3
    assert [report.n_done for report in seen] == [0, *range(n_domain + n_neutral + 1)]
    files = state_files(options)
    assert len(files) == n_domain + 2 * n_neutral
    entering = [file for file in files if ".enter-1." in file.name]
    assert seen[0].n_bytes == sum(file.stat().st_size for file in entering)


def test_a_second_run_and_a_resumed_one_need_no_engine(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = engines(monkeypatch)
    fit(options)
    expected = rows(options, "fit-001")

    def crash(report: StepReport) -> None:
        if report.step == 3:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fit(options, crash)
    resume(options.project)
    assert rows(options, "fit-002") == expected  # bit by bit
    for file in state_files(options):  # as a run does that another one's needs pushed out
        if ".final-" in file.name:
            file.unlink()
    fit(options)
    assert rows(options, "fit-003") == expected
    assert len(started) == 1 and started[0].returncode == 0


def test_states_are_the_engines_and_a_spoilt_file_is_made_again(options: TrainOptions) -> None:
    fit(options)
    files = state_files(options)
    content = {file: file.read_bytes() for file in files}
    files[0].write_bytes(b"")
    files[1].unlink()
    fit(options)
    assert {file: file.read_bytes() for file in state_files(options)} == content
    arrays = [np.load(file).astype(np.float32) for file in files if ".enter-1." in file.name]
    with Engine.load(options.base, n_threads=1) as engine:
        encoder = Encoder(read_metadata(options.base))
        blocks = np.concatenate(
            [
                pack_blocks(read_documents(kind), encoder, options.block_tokens).ids
                for kind in (options.data, options.neutral)
            ]
        )
        entering = [engine.hidden(block.tolist(), 1) for block in blocks]
    for array in arrays:  # F16 has 11 bits
        assert any(np.allclose(array, expected, rtol=1e-3, atol=1e-3) for expected in entering)


def test_an_engine_that_is_killed_ends_the_run_and_leaves_what_it_did(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = engines(monkeypatch)

    def kill() -> None:
        started[0].kill()
        started[0].wait()

    with pytest.raises(TrainingError, match="ended by signal 9"):
        fit(options, state_watch=behind_block(5, kill))
    assert len(state_files(options)) >= 5
    assert not (options.project / "runs").exists()
    assert shm_file(channel_name(options.project)).exists()  # it had no time
    seen: list[StateReport] = []
    fit(options, state_watch=seen.append)  # cleans up and says so, and does the rest
    assert str(started[0].pid) in seen[1].notice and seen[0].n_done >= 5
    assert not shm_file(channel_name(options.project)).exists()


def test_ctrl_c_while_the_engine_works_ends_it(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = engines(monkeypatch)
    press = behind_block(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(options, state_watch=press)
    assert started[0].returncode is not None
    assert not shm_file(channel_name(options.project)).exists()


def test_an_engine_that_cannot_start_says_why(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = replace(options, block_tokens=1024)
    (options.project / "domain.txt").write_text("fever of the knee " * 1000)
    (options.project / "neutral.txt").write_text("RIVER MOON " * 2000)
    with pytest.raises(TrainingError, match="InvalidRequestError: n_ctx"):
        fit(too_long)
    monkeypatch.setattr(engine_process, "__name__", "modularbase.nothing")
    with pytest.raises(TrainingError, match=r"ended with code 1.*modularbase\.nothing"):
        fit(options)


def test_a_cache_that_is_too_small_is_named(options: TrainOptions) -> None:
    with pytest.raises(TrainingError, match="the limit is 10000"):
        fit(replace(options, state_cache_bytes=10_000))
    assert state_files(options) == []


class EngineProcess(subprocess.Popen[bytes]):
    """An engine process that is ready."""

    def __init__(self, model: Path, name: str) -> None:
        """Starts it, with a ring of this name."""
        command = [sys.executable, "-m", "modularbase.training.engine_process"]
        arguments = [str(model), name, "1", "32", "1"]
        super().__init__([*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.stdout is not None
        self.notice: str = json.loads(self.stdout.readline())["notice"]


def test_the_process_ends_with_who_started_it_and_cleans_up(
    name: str, tiny_model: TinyModelFactory
) -> None:
    model = tiny_model().path
    with EngineProcess(model, name) as killed:
        killed.send_signal(signal.SIGINT)  # is for who started it
        with pytest.raises(subprocess.TimeoutExpired):
            killed.wait(0.2)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL and shm_file(name).exists()
    with EngineProcess(model, name) as terminated:
        assert str(killed.pid) in terminated.notice
        terminated.terminate()
    assert terminated.returncode == 128 + signal.SIGTERM and not shm_file(name).exists()
    with EngineProcess(model, name) as left:  # its stdin ends with the block, as with a parent
        assert left.notice == ""
    assert left.returncode == 0 and not shm_file(name).exists()
