"""Answers of a teacher over HTTP: a real server, with the faults that real ones have."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modularbase.errors import CancelledError, InvalidRequestError, TeacherError
from modularbase.training import chat_endpoint
from modularbase.training.answers import AnswerProgress, Taught, gather_answers, read_prompts
from modularbase.training.chat_endpoint import ChatEndpoint, EndpointOptions
from modularbase.training.texts import Document, read_documents
from tests.python.training.teacher_server import Fault, TeacherState, running_teacher

PROMPTS = [f"What is {i}?" for i in range(30)]


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[TeacherState]:
    monkeypatch.setattr(chat_endpoint, "RETRY_WAIT_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_teacher() as state:
        yield state


def endpoint(teacher: TeacherState, **changes: Any) -> ChatEndpoint:
    given: dict[str, Any] = {"url": teacher.url, "model": "big", "timeout_s": 5.0, "n_attempts": 3}
    return ChatEndpoint(EndpointOptions(**given | changes))


def ask(teacher: TeacherState, prompt: str = "Why?", **changes: Any) -> str:
    return endpoint(teacher, **changes).ask(prompt, threading.Event()).text


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_asked_and_answered(teacher: TeacherState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-1 \n")
    told = {"system": "Be short.", "api_key_env": "THE_KEY", "max_tokens": 7, "temperature": 0.5}
    assert ask(teacher, "Wie heißt 医疗?", **told) == "Answer to: Wie heißt 医疗?"
    (sent,) = teacher.requests
    assert sent["path"] == "/v1/chat/completions" and sent["key"] == "Bearer sk-1"
    assert sent["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Wie heißt 医疗?"},
    ]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("big", 7, 0.5)
    assert ask(teacher, "Once", kind="text") == "Answer to: Once"
    assert teacher.requests[-1]["path"] == "/v1/completions"
    assert teacher.requests[-1]["prompt"] == "Once" and teacher.requests[-1]["key"] is None


@pytest.mark.parametrize("fault", [429, 500, 503, 408, None, b'{"choices": [{"mess', b"<html>"])
def test_faults_that_pass_are_asked_again(fault: Fault, teacher: TeacherState) -> None:
    teacher.faults = [fault, fault]
    assert ask(teacher) == "Answer to: Why?"
    assert len(teacher.requests) == 3
    teacher.faults = [fault] * 3
    with pytest.raises(TeacherError, match="gave up after 3 attempts"):
        ask(teacher)
    assert len(teacher.requests) == 6


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (400, "answered 400: .*not now"),
        (401, "answered 401"),
        (302, "answered 302"),
        (b"[]", "choices"),
        (b'{"choices": []}', "choices"),
        (b'{"choices": [{"text": "x"}]}', "choices"),
        (b'{"choices": [{"message": {"content": null}}]}', "None"),
        (b'"text"', "choices"),
        (b'{"error": {"message": "no such model"}}', "no such model"),
    ],
)
def test_refusals_and_other_answers_are_not_asked_again(
    fault: Fault, told: str, teacher: TeacherState
) -> None:
    teacher.faults = [fault]
    teacher.headers = {"Location": "http://127.0.0.1:9/elsewhere"}
    with pytest.raises(TeacherError, match=told):
        ask(teacher)
    assert len(teacher.requests) == 1


def test_the_wait_the_server_asks_for_is_kept(
    teacher: TeacherState, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(chat_endpoint, "RETRY_WAIT_S", 1.0)
    teacher.faults = [429, 500, 500]
    teacher.headers = {"Retry-After": "7"}
    endpoint(teacher, n_attempts=4).ask("Why?", Stop())
    assert waits == [0, 7, 7, 7]
    teacher.faults, teacher.headers = [429, 500, 500], {"Retry-After": "soon"}
    endpoint(teacher, n_attempts=4).ask("Why?", Stop())
    assert all(low <= wait <= 2 * low for wait, low in zip(waits[5:], (0.5, 1, 2), strict=True))


def test_a_silent_server_and_none_at_all(teacher: TeacherState) -> None:
    teacher.wait = threading.Event()
    with pytest.raises(TeacherError, match=r"2 attempts: .*timed out"):
        ask(teacher, timeout_s=0.2, n_attempts=2)
    teacher.wait.set()
    with pytest.raises(TeacherError, match="gave up"):
        ask(replace_url(teacher, "http://127.0.0.1:9/v1"))
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        endpoint(teacher).ask("Why?", stopped)


def replace_url(teacher: TeacherState, url: str) -> TeacherState:
    return replace(teacher, url=url)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("teacher", {"url": "ftp://somewhere"}),
        ("model", {"model": ""}),
        ("max_tokens", {"max_tokens": 0}),
        ("n_attempts", {"n_attempts": 0}),
        ("temperature", {"temperature": -1.0}),
        ("timeout_s", {"timeout_s": 0.0}),
        ("system", {"kind": "text", "system": "x"}),
        ("api_key_env", {"api_key_env": "NOBODY_SETS_THIS"}),
    ],
)
def test_options_that_make_no_sense(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        ChatEndpoint(EndpointOptions(**{"url": "http://a/v1", "model": "m", **changes}))


def gather(teacher: TeacherState, folder: Path, **changes: Any) -> Taught:
    return gather_answers(endpoint(teacher), PROMPTS, folder, **changes)


def test_answers_are_gathered_by_several_at_once(teacher: TeacherState, tmp_path: Path) -> None:
    teacher.wait = threading.Event()
    threading.Timer(0.3, teacher.wait.set).start()
    seen: list[AnswerProgress] = []
    taught = gather(teacher, tmp_path / "run", n_at_once=5, on_progress=seen.append)
    assert teacher.n_at_once == 5 and len(teacher.requests) == 30
    assert [step.n_answered for step in seen] == list(range(31))
    assert taught == Taught(tmp_path / "run" / "train.jsonl", 30, 0, 0, 0)
    # In the order of the prompts, whichever answer came first; what training reads.
    assert [row["prompt"] for row in rows(taught.path)] == PROMPTS
    found = Document("Answer to: What is 3?", prompt="What is 3?")
    assert read_documents([taught.path])[3] == found
    assert gather(teacher, tmp_path / "run") == taught
    assert len(teacher.requests) == 30  # nothing is asked twice


def test_a_gathering_that_was_cut_goes_on(teacher: TeacherState, tmp_path: Path) -> None:
    def press(step: AnswerProgress) -> None:
        if step.n_answered == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gather(teacher, tmp_path, n_at_once=1, on_progress=press)
    path = tmp_path / "answers.jsonl"
    assert len(rows(path)) == 10 and not (tmp_path / "train.jsonl").exists()
    with path.open("a") as file:
        file.write('{"prompt": "What is 10?", "resp')  # as a crash leaves it
    teacher.requests.clear()
    taught = gather(teacher, tmp_path)
    assert taught.n_rows == 30 and len(rows(path)) == 30
    asked = {request["messages"][0]["content"] for request in teacher.requests}
    assert asked == set(PROMPTS[10:])


def test_a_prompt_that_comes_twice_is_asked_once(teacher: TeacherState, tmp_path: Path) -> None:
    taught = gather_answers(endpoint(teacher), ["a", "b", "a"], tmp_path)
    assert taught.n_rows == 2 and len(teacher.requests) == 2


def test_few_failures_are_left_out_and_many_end_it(teacher: TeacherState, tmp_path: Path) -> None:
    teacher.fault_of = lambda prompt: 400 if prompt in PROMPTS[:3] else None
    taught = gather(teacher, tmp_path)
    assert (taught.n_rows, taught.n_failed) == (27, 3)
    teacher.fault_of = lambda prompt: 400
    with pytest.raises(TeacherError, match="4 of 30 prompts failed"):
        gather(teacher, tmp_path / "all")
    assert len(teacher.requests) < 60
    teacher.fault_of = None
    assert gather(teacher, tmp_path).n_failed == 0  # asked again, and now answered


def test_a_refused_key_ends_it_at_once(teacher: TeacherState, tmp_path: Path) -> None:
    teacher.fault_of = lambda prompt: 401 if prompt == PROMPTS[5] else None
    with pytest.raises(TeacherError, match="401") as caught:
        gather(teacher, tmp_path, n_at_once=1)
    assert caught.value.status == 401 and len(rows(tmp_path / "answers.jsonl")) == 5


def test_unfinished_and_empty_answers_teach_nothing(teacher: TeacherState, tmp_path: Path) -> None:
    teacher.answer = lambda prompt: " \n" if prompt == PROMPTS[0] else "x"
    assert gather(teacher, tmp_path).n_empty == 1
    teacher.finish_reason = "length"
    with pytest.raises(InvalidRequestError, match="30 cut off"):
        gather(teacher, tmp_path / "cut")
    teacher.finish_reason = None
    assert gather(teacher, tmp_path / "silent").n_rows == 29


def test_prompts_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two  \n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "one\\ntwo", "response": "x"}\n\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    assert read_prompts(tmp_path / "b.jsonl") == ["one\ntwo"]
    for name, text in (
        ("c.txt", "\n"),
        ("c.jsonl", '{"text": "x"}\n'),
        ("c.jsonl", '{"prompt": 3}\n'),
        ("c.jsonl", '{"prompt": " "}\n'),
        ("c.jsonl", "plain\n"),
        ("nowhere/c.txt", None),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InvalidRequestError, match="prompts"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize("line", ["[]", '{"prompt": "a"}', '{"prompt": "a", "response": 1}', "x"])
def test_answers_of_something_else(line: str, teacher: TeacherState, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidRequestError, match=r"answers\.jsonl, line 1"):
        gather(teacher, tmp_path)
