"""The commands: data on stdout, all else on stderr, and the exit code."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import modularbase
from modularbase import Engine

if TYPE_CHECKING:
    from tests.python.cli.conftest import Cli

GREEDY = ("--temp", 0, "-t", 1)
COMMAND = Path(sys.executable).with_name("modularbase")


def test_help(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.code == 0
    runs, shows, keeps = (
        ("generate", "chat", "bench", "score"),
        ("info", "doctor"),
        ("base", "pack"),
    )
    for command in (*runs, *shows, *keeps, "context"):
        assert command in shown.out
        assert cli(command, "--help").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("generate", "--bogus"),
        ("generate", "-p", "x", "-n", "many"),
        ("generate", "-p", "x", "--dtype", "q4"),
        ("generate",),
        ("score",),
        ("bench", "--rounds", 0),
        ("bench", "--parallel", 0),
    ],
    ids=str,
)
def test_wrong_usage(arguments: tuple[object, ...], cli: Cli) -> None:
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


def test_generate(cli: Cli, chat_model: Path) -> None:
    with Engine.load(chat_model, n_threads=1) as engine:
        expected = engine.chat([{"role": "user", "content": "hi"}], temperature=0, max_tokens=12)
        raw = engine.generate("hi", temperature=0, max_tokens=12)
    shared = ("generate", "-b", chat_model, "-n", 12, *GREEDY)
    shown = cli(*shared, "-p", "hi")
    assert (shown.code, shown.out) == (0, expected.text + "\n")
    assert "tokens/s" in shown.err
    assert cli(*shared, "--raw", "-p", "hi").out == raw.text + "\n"
    assert cli(*shared, "--raw", "-p", "-", stdin=b"hi").out == raw.text + "\n"
    assert cli(*shared, "--raw", "-p", "hi", "--draft", 4).out == raw.text + "\n"
    stopped = cli(*shared, "--raw", "-p", "hi", "--stop", raw.text[4:6], "--stop", "zzz")
    assert stopped.out == raw.text[: raw.text.index(raw.text[4:6])] + "\n"


def test_generate_json(cli: Cli, chat_model: Path) -> None:
    with Engine.load(chat_model, n_threads=1) as engine:
        expected = engine.generate("hi", max_tokens=9, seed=3)
    shown = cli(
        "generate", "-b", chat_model, "-t", 1, "--raw", "-p", "hi", "-n", 9, "--seed", 3, "--json"
    )
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert found["text"] == expected.text
    assert found["token_ids"] == expected.token_ids
    assert found["finish_reason"] == expected.finish_reason
    assert found["usage"]["prompt_tokens"] == 2
    assert found["timings"]["ttft_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("-p", ""), 2, "InvalidRequestError: prompt"),
        (("-p", "x", "--temp", "-1"), 2, "InvalidRequestError: temperature"),
        (("-p", "x", "--top-p", "nan"), 2, "InvalidRequestError: top_p"),
        (("-p", "x", "-n", "0"), 2, "InvalidRequestError: max_tokens"),
        (("-p", "x", "--stop", ""), 2, "InvalidRequestError: stop"),
        (("-p", "x", "-t", "100000"), 2, "InvalidRequestError: n_threads"),
        (("-p", "x", "-c", "100000"), 2, "InvalidRequestError: n_ctx"),
        (("-p", "\udcff"), 2, "InvalidRequestError: text"),
        (("-p", "x", "-n", "9999"), 1, "ContextLengthError"),
        (("-p", "x", "--device", "cuda"), 1, "DeviceError"),
        (("-p", "x", "-b", "no-such-base"), 1, "BaseNotFoundError"),
        (("-p", "x", "-b", "/no/such.gguf"), 1, "BaseLoadError"),
        (("-p", "x", "-b", __file__), 1, "BaseLoadError"),
    ],
    ids=str,
)
def test_generate_refuses(
    arguments: tuple[str, ...], code: int, error: str, cli: Cli, chat_model: Path
) -> None:
    outcome = cli("generate", "-b", chat_model, "-t", 1, "--raw", *arguments)
    assert outcome.code == code
    assert f"error: {error}" in outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("command", [("generate", "--raw", "-p", "-"), ("score", "-")], ids=str)
def test_stdin_that_is_not_utf8(command: tuple[str, ...], cli: Cli, chat_model: Path) -> None:
    outcome = cli(*command, "-b", chat_model, "-t", 1, stdin=b"caf\xe9 au lait")
    assert (outcome.code, outcome.out) == (2, "")
    assert "InvalidRequestError: stdin: expected UTF-8" in outcome.err


def test_score(cli: Cli, chat_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat", encoding="utf-8")
    with Engine.load(chat_model, n_threads=1) as engine:
        expected = engine.score(text.read_text())
    shared = ("score", "-b", chat_model, "-t", 1)
    shown = cli(*shared, text)
    assert shown.code == 0
    n_scored = len(expected.logprobs)
    assert shown.out == f"perplexity {expected.perplexity:.4f} over {n_scored} tokens\n"
    found = json.loads(cli(*shared, "-", "--json", stdin=text.read_bytes()).out)
    assert found["token_ids"] == expected.token_ids
    assert found["logprobs"] == pytest.approx(expected.logprobs.tolist())
    assert found["perplexity"] == pytest.approx(math.exp(-expected.logprobs.mean()))
    text.write_bytes(b"\xff\xfe")
    for bad in (text, tmp_path, tmp_path / "none.txt"):
        outcome = cli(*shared, bad)
        assert (outcome.code, outcome.out) == (2, "")
        assert "InvalidRequestError: file" in outcome.err


def test_bench(cli: Cli, chat_model: Path) -> None:
    shared = ("bench", "-b", chat_model, "-t", 1, "-p", 8, "-n", 4, "-r", 2, "--parallel", 2)
    shown = cli(*shared)
    assert shown.code == 0
    assert [line.split()[0] for line in shown.out.splitlines()] == [
        "prefill_tps",
        "decode_tps",
        "ttft_ms",
        "total_tps",
    ]
    assert "round 2 of 2" in shown.err
    found = json.loads(cli(*shared, "--json").out)
    assert found["base"] == str(chat_model)
    assert len(found["rounds"]) == 2
    assert all(value > 0 for value in found["figures"].values())


def test_info(cli: Cli, chat_model: Path, tmp_path: Path) -> None:
    shown = cli("info", chat_model)
    assert (shown.code, shown.err) == (0, "")
    assert "llama.block_count" in shown.out
    found = json.loads(cli("info", chat_model, "--json").out)
    assert (found["general.architecture"], found["llama.block_count"]) == ("llama", 3)
    assert found["n_bytes"] == chat_model.stat().st_size
    assert found["tokenizer.ggml.tokens"] == "[320 values]"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(chat_model.read_bytes()[:1000])
    outcome = cli("info", broken, "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "BaseLoadError" in outcome.err


def test_doctor(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert found["modularbase"] == modularbase.__version__
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert found["ggml"]
    assert isinstance(found["cpu_features"], list)
    shown = cli("doctor")
    assert (shown.code, shown.err) == (0, "")
    assert set(found) <= {word for line in shown.out.splitlines() for word in line.split()}


def test_base(cli: Cli) -> None:
    listed = json.loads(cli("base", "list", "--json").out)
    names = [entry["name"] for entry in listed]
    assert "smollm2-135m" in names
    assert all(entry["path"] is None for entry in listed)
    shown = cli("base", "list")
    assert (shown.code, shown.err) == (0, "")
    assert "smollm2-135m" in shown.out
    assert json.loads(cli("base", "info", "smollm2-135m", "--json").out) == listed[0]
    assert "apache-2.0" in cli("base", "info", "smollm2-135m").out
    for command in (("info", "nope"), ("install", "nope"), ("remove", "smollm2-135m")):
        outcome = cli("base", *command)
        assert (outcome.code, outcome.out) == (1, "")
        assert "error: " in outcome.err


def test_a_data_folder_that_cannot_be_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULARBASE_HOME", "/proc/nowhere")
    for command in (("base", "install", "smollm2-135m"), ("generate", "-p", "hi")):
        outcome = cli(*command)
        assert (outcome.code, outcome.out) == (1, "")
        assert "InstallError: smollm2-135m: cannot write there" in outcome.err


def interrupted(*arguments: object, after: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command and sends Ctrl-C once it has printed something."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stream = process.stdout if after == "stdout" else process.stderr
    assert stream is not None
    stream.read(1)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_ctrl_c(chat_model: Path) -> None:
    ended = interrupted(
        "bench", "-b", chat_model, *GREEDY[2:], "-p", 100, "-r", 10**6, after="stderr"
    )
    assert ended.returncode == 130
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


def test_a_reader_that_leaves(chat_model: Path) -> None:
    # As in `modularbase generate ... | head -c 1`.
    process = subprocess.Popen(
        [COMMAND, "generate", "-b", chat_model, "-t", "1", "--raw", "-p", "hi", "-n", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert b"Traceback" not in err
