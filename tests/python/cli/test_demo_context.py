"""`modularbase demo context` on a tiny random base: what it counts, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.conftest import CHAT_TEMPLATE
from tests.tools.gguf_edit import copy_gguf


@pytest.fixture(scope="module")
def base(tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that says nothing of sense; heads of 32, since blocks of 4 bits need that."""
    path = tmp_path_factory.mktemp("demo_context") / "tiny-wide.gguf"
    changes = {"tokenizer.chat_template": CHAT_TEMPLATE, "qwen3.context_length": 4096}
    return copy_gguf(tiny_model("qwen3").path, path, changes=changes)


def test_json(cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shown = cli(
        "demo", "context", "--base", base, "--turns", 6, "--budget", "1GB", "--threads", 1, "--json"
    )
    assert shown.code == 0, shown.err
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["turn"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["turn"] for row in rows if row["probe"]] == [5, 6]
    for row in rows:
        assert sum(row["tokens"].values()) == row["total_tokens"]
        assert not row["tiered"]["obeys"] and not row["f16"]["obeys"]  # it is told honestly
    # A probe leaves nothing in the dialogue, and nothing on the disk.
    tokens = [row["total_tokens"] for row in rows]
    assert tokens == sorted(tokens) and tokens[5] - tokens[4] < 2 * (tokens[4] - tokens[3])
    assert not list(tmp_path.glob("modularbase-*"))


def test_lines(cli: Cli, base: Path) -> None:
    shown = cli("demo", "context", "--base", base, "--turns", 2, "--budget", "1GB", "--threads", 1)
    assert shown.code == 0, shown.err
    head, first, second, question, tiered, f16 = shown.out.splitlines()
    assert head.split()[:4] == ["turn", "tokens", "F16", "now"]
    assert first.split()[0] == "1" and second.split()[0] == "2"
    assert question.strip().startswith("> ")
    assert "tiered does not obey" in tiered and "F16 does not obey" in f16
    assert "the rule: You are a pirate" in shown.err


def test_a_budget_that_is_too_small(cli: Cli, base: Path) -> None:
    shown = cli("demo", "context", "--base", base, "--turns", 2, "--budget", "1kB", "--threads", 1)
    assert shown.code == 1
    assert "ContextBudgetError" in shown.err
    assert cli("demo", "context", "--base", base, "--budget", "much").code == 2
