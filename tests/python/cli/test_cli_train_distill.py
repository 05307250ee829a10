"""`modularbase train distill`: from each kind of teacher to trained weights."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modularbase.packs.project import CONFIG_FILE, read_manifest
from modularbase.training import chat_endpoint
from modularbase.training.run_folder import RunFolder
from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.training.teacher_server import TeacherState, running_teacher
from tests.python.training.toy import make_project
from tests.tools.gguf_edit import copy_gguf

SHORT = ("--steps", 4, "--batch-blocks", 4, "--block-tokens", 32, "--precision", "f32")
LIGHT = ("--heldout-blocks", 4, "-t", 1)
# The least of a template: the base has none of its own.
TEMPLATE = "{{ messages[0]['content'] }}?"


@pytest.fixture
def project(tmp_path: Path, tiny_model: TinyModelFactory) -> Path:
    """A project whose base has a chat template."""
    model = tiny_model()
    folder = tmp_path / "toy"
    make_project(folder, model)
    base = tmp_path / "base.gguf"
    copy_gguf(model.path, base, changes={"tokenizer.chat_template": TEMPLATE})
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace(f'"{model.path.stem}"', f'"{base}"'))
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherState]:
    monkeypatch.setattr(chat_endpoint, "RETRY_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_teacher() as state:
        yield state


def command(project: Path, teacher: object, *more: object) -> tuple[object, ...]:
    neutral = ("--neutral", project / "neutral.txt")
    return ("train", "distill", project, "--teacher", teacher, *neutral, *SHORT, *LIGHT, *more)


def test_a_larger_file_teaches(cli: Cli, project: Path, tiny_model: TinyModelFactory) -> None:
    teacher = tiny_model("qwen3", seed=5).path
    data = ("--data", project / "domain.txt", "--teacher-weight", 1, "--json")
    shown = cli(*command(project, teacher, *data))
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["pack"]["teacher_kl"] < facts["base"]["teacher_kl"]
    options = RunFolder(Path(facts["run"])).options()
    assert (options.teacher, options.teacher_weight) == (teacher, 1.0)
    assert list((project / "runs").glob("teacher-*/*.npy"))
    manifest = read_manifest(project)
    assert manifest.evaluation["heldout teacher kl"] == facts["pack"]["teacher_kl"]
    assert f"teacher: {teacher.name}" in manifest.training.data
    again = cli("train", "fit", project, "--resume", "--json")  # it is a run like any other
    assert json.loads(again.out)["pack"] == facts["pack"]


def test_a_server_answers_prompts(
    cli: Cli, project: Path, server: TeacherState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-1")
    prompts = project / "prompts.jsonl"
    rows = [{"prompt": f"Which knee {i}"} for i in range(30)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.faults = [429, None]
    server.answer = lambda prompt: f"{prompt}, the left knee, acute"
    asked = ("--model", "big", "--prompts", prompts, "--api-key-env", "THE_KEY", "--json")
    shown = cli(*command(project, server.url, *asked))
    assert shown.code == 0, shown.err
    assert "asking the teacher" in shown.err and "30 answers" in shown.err
    facts = json.loads(shown.out)
    assert facts["pack"]["perplexity"] < facts["base"]["perplexity"]
    assert {request["key"] for request in server.requests} == {"Bearer sk-1"}
    n_asked = len(server.requests)
    assert cli(*command(project, server.url, *asked)).code == 0
    assert len(server.requests) == n_asked  # the answers are there
    changed = cli(*command(project, server.url, *asked, "--system", "Be short."))
    assert changed.code == 0 and len(server.requests) == n_asked + 30
    assert "sk-1" not in (project / "pack.json").read_text()
    assert not any(b"sk-1" in path.read_bytes() for path in project.rglob("*") if path.is_file())


def test_an_interrupted_asking_goes_on(cli: Cli, project: Path, server: TeacherState) -> None:
    prompts = project / "prompts.txt"
    prompts.write_text("".join(f"Which knee {i}\n" for i in range(30)))
    asked = ("--model", "big", "--prompts", prompts, "--at-once", 1)

    def press(prompt: str) -> str:
        if prompt == "Which knee 12":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # the main thread is told meanwhile
        return f"{prompt}, the left knee, acute"

    server.answer = press
    stopped = cli(*command(project, server.url, *asked))
    assert stopped.code == 130 and "the same command goes on" in stopped.err
    server.answer = lambda prompt: f"{prompt}, the left knee, acute"
    server.requests.clear()
    assert cli(*command(project, server.url, *asked)).code == 0
    assert len(server.requests) < 20


def test_answers_that_are_there_teach(cli: Cli, project: Path) -> None:
    rows = [{"prompt": f"Knee {i}", "response": "acute fever of the left knee"} for i in range(40)]
    path = project / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = cli(*command(project, path, "--json"))
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["pack"]["perplexity"] < facts["base"]["perplexity"]


def test_what_goes_wrong_is_said(
    cli: Cli, project: Path, server: TeacherState, tiny_model: TinyModelFactory
) -> None:
    prompts = project / "prompts.txt"
    prompts.write_text("Why\n")
    asked = ("--model", "big", "--prompts", prompts)
    server.fault_of = lambda prompt: 401
    file = tiny_model("qwen3", seed=5).path
    for code, given, told in (
        (2, command(project, server.url), "--prompts"),
        (2, command(project, file, "--prompts", prompts), "--prompts"),
        (2, command(project, server.url, "--prompts", prompts), "model"),
        (2, command(project, server.url, *asked, "--teacher-weight", 0.5), "--teacher-weight"),
        (2, command(project, server.url, *asked, "--lr", 0), "learning_rate"),
        (2, command(project, server.url, *asked, "--api-key-env", "NOBODY"), "NOBODY"),
        (1, command(project, server.url, *asked), "401"),
        (1, command(project, "nobody"), "nobody"),
        (2, command(project, project / "nowhere.jsonl"), "nowhere"),
        (2, command(project, file, "--teacher-weight", 2), "teacher_weight"),
    ):
        shown = cli(*given)
        assert (shown.code, shown.out) == (code, ""), shown.err
        assert told in shown.err and "Traceback" not in shown.err
    assert not list((project / "runs").glob("fit-*"))
