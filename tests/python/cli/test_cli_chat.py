"""The chat: piped questions, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from modularbase import Engine

if TYPE_CHECKING:
    from tests.python.cli.conftest import Cli, Outcome


@pytest.fixture
def chat(cli: Cli, chat_model: Path) -> Any:
    """Holds a conversation of these lines."""

    def run(*lines: str, options: tuple[object, ...] = ()) -> Outcome:
        shared = ("chat", "-b", chat_model, "-t", 1, "--temp", 0, "-n", 8)
        return cli(*shared, *options, stdin="".join(f"{line}\n" for line in lines).encode())

    return run


@pytest.fixture(scope="module")
def answers(chat_model: Path) -> list[str]:
    """What the base answers to "one", and then to "two"."""
    messages: list[dict[str, str]] = []
    texts = []
    with Engine.load(chat_model, n_threads=1) as engine:
        for question in ("one", "two"):
            messages.append({"role": "user", "content": question})
            texts.append(engine.chat(messages, temperature=0, max_tokens=8).text)
            messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_answers_and_history(chat: Any, answers: list[str]) -> None:
    shown = chat("one", "", "two")
    assert shown.code == 0
    assert shown.out == "".join(f"{answer}\n" for answer in answers)
    assert shown.err == ""
    assert answers[0] != answers[1]


def test_the_last_line_needs_no_end(cli: Cli, chat_model: Path, answers: list[str]) -> None:
    shared = ("chat", "-b", chat_model, "-t", 1, "--temp", 0, "-n", 8)
    assert cli(*shared, stdin=b"one").out == answers[0] + "\n"
    assert cli(*shared, stdin=b"").out == ""


def test_commands_that_change_the_history(chat: Any, answers: list[str]) -> None:
    first, second = answers
    assert chat("one", "/reset", "one").out == f"{first}\n{first}\n"
    assert chat("one", "two", "/undo", "two").out == f"{first}\n{second}\n{second}\n"
    assert chat("one", "/retry").out == f"{first}\n{first}\n"
    assert chat("one", "/exit", "two").out == f"{first}\n"
    assert chat("one", "/quit", "two").out == f"{first}\n"
    empty = chat("/undo", "/retry")
    assert (empty.code, empty.out) == (0, "")
    assert "nothing to answer again" in empty.err


def test_the_system_message(chat: Any, answers: list[str]) -> None:
    by_command = chat("two", "/system be brief", "one").out.splitlines()[1:]
    by_option = chat("one", options=("--system", "be brief")).out.splitlines()
    assert by_command == by_option != [answers[0]]
    assert chat("/system be brief", "/system", "one").out == answers[0] + "\n"


def test_parameters(chat: Any, answers: list[str]) -> None:
    shown = chat("/params", "/set max_tokens 1", "one", "/set max_tokens none", "/params")
    assert '"max_tokens": 8' in shown.err
    assert '"max_tokens": null' in shown.err
    assert len(shown.out) < len(answers[0])
    for line, words in (
        ("/set colour 3", "no parameter 'colour'"),
        ("/set temperature warm", "a number expected"),
        ("/set temperature -1\none", "InvalidRequestError: temperature"),
        ('/set seed "x"\none', "InvalidRequestError: seed"),
    ):
        refused = chat(line, "/set temperature 0", "/set seed none", "one")
        assert words in refused.err
        assert refused.out == answers[0] + "\n"  # a refused question is forgotten


def test_save_and_load(chat: Any, answers: list[str], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    assert "saved 2 messages" in chat("one", f"/save {file}").err.replace("\n", " ")
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answers[0]},
    ]
    assert chat(f"/load {file}", "two").out == answers[1] + "\n"
    (tmp_path / "bad.json").write_text("[1")
    (tmp_path / "other.json").write_text('{"role": "user"}')
    (tmp_path / "bytes.json").write_bytes(b'["\xff"]')
    for name in ("bad.json", "other.json", "bytes.json", "none.json", "", "a\0b"):
        refused = chat(f"/load {tmp_path / name}", "one")
        assert (refused.code, refused.out) == (0, answers[0] + "\n")
        assert "cannot load" in refused.err
    for place in ("/proc/nowhere", str(tmp_path), "a\0b"):
        assert "cannot write" in chat(f"/save {place}").err


def test_help_stats_and_unknown_commands(chat: Any) -> None:
    shown = chat("/help", "/stats", "/fly", "one", "/stats")
    assert shown.code == 0
    for words in ("/undo", "nothing answered yet", "no command /fly", "8 generated"):
        assert words in shown.err


def test_what_is_not_utf8_is_refused(cli: Cli, chat_model: Path, answers: list[str]) -> None:
    shared = ("chat", "-b", chat_model, "-t", 1, "--temp", 0, "-n", 8)
    shown = cli(*shared, stdin=b"caf\xe9\none\n")
    assert (shown.code, shown.out) == (0, answers[0] + "\n")
    assert "InvalidRequestError: stdin: expected UTF-8" in shown.err


def test_a_base_that_was_not_made_for_chat(cli: Cli, tiny_model: Any) -> None:
    shown = cli("chat", "-b", tiny_model().path, "-t", 1, stdin=b"one\n")
    assert (shown.code, shown.out) == (0, "")
    assert "ChatTemplateError" in shown.err
