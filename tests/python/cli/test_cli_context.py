"""`modularbase context explain`: the dialogue by tier, in the terminal, as JSON and as a page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.python.cli.conftest import Cli

SEA = "The sea was grey and quiet, and the boats lay in the harbour all day long."
DIALOGUE = [
    {"role": "system", "content": "Be <b>kind</b> & brief."},
    {"role": "user", "content": "Always answer in rhymes."},
    {"role": "assistant", "content": f"{SEA} {SEA} {SEA}"},
    {"role": "user", "content": "Thanks a lot!", "tier": "redundant"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(m) + "\n\n" for m in DIALOGUE), encoding="utf-8")
    return path


def explained(cli: Cli, *arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    shown = cli("context", "explain", *arguments, "--json", stdin=stdin)
    assert (shown.code, shown.err) == (0, "")
    found: dict[str, Any] = json.loads(shown.out)
    return found


def test_json(cli: Cli, chat_model: Path, file: Path) -> None:
    found = explained(cli, file, "-b", chat_model, "--window", 4)
    assert "".join(d["text"] for d in found["decisions"]) == (
        f"[system]Be <b>kind</b> & brief.\n[user]Always answer in rhymes.\n"
        f"[assistant]{SEA} {SEA} {SEA}\n[user]Thanks a lot!\n[a]"
    )
    tiers = {d["text"].strip(): (d["tier"], d["reason"]) for d in found["decisions"]}
    assert tiers["Always answer in rhymes."] == ("key", "rule 'Always'")
    assert tiers[SEA] == ("important", "no floor")
    assert tiers["Thanks a lot!"] == ("redundant", "set by the caller")
    assert found["total_tokens"] == sum(d["n_tokens"] for d in found["decisions"])
    assert found["total_tokens"] == sum(found["tokens"].values()) + 4
    # Three layers, two heads of 16: 384 bytes a token in F16.
    assert found["exact_bytes"] == 384 * found["total_tokens"]
    assert found["window_bytes"] == 4 * 384


def test_a_list_and_stdin_are_the_same(cli: Cli, chat_model: Path, file: Path) -> None:
    expected = explained(cli, file, "-b", chat_model)
    listed = file.with_suffix(".json")
    listed.write_text(json.dumps(DIALOGUE, indent=2), encoding="utf-8")
    assert explained(cli, listed, "-b", chat_model) == expected
    assert explained(cli, "-", "-b", chat_model, stdin=file.read_bytes()) == expected


def test_a_budget_summarises(cli: Cli, chat_model: Path, file: Path) -> None:
    shared = (file, "-b", chat_model, "--window", 4)
    free = explained(cli, *shared)
    n_bytes = free["total_bytes"]
    found = explained(cli, *shared, "--budget", n_bytes - 1000)
    demoted = [d for d in found["decisions"] if d["demoted_from"] and d["role"] == "assistant"]
    assert demoted and found["total_bytes"] <= n_bytes - 1000
    refused = cli("context", "explain", *shared, "--budget", "1kB")
    assert (refused.code, refused.out) == (1, "")
    assert "ContextBudgetError: the context needs" in refused.err
    assert "system prompt" in refused.err and "rules" in refused.err


def test_the_terminal(
    cli: Cli, chat_model: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = cli("context", "explain", file, "-b", chat_model)
    assert (shown.code, shown.err) == (0, "")
    assert "Be <b>kind</b> & brief." in shown.out
    (rule,) = [line for line in shown.out.splitlines() if "in rhymes" in line]
    assert "user" in rule and "key" in rule and "rule 'Always'" in rule
    assert "all kept exactly" in shown.out and "window" in shown.out


def test_the_page(cli: Cli, chat_model: Path, file: Path, tmp_path: Path) -> None:
    page = tmp_path / "talk.html"
    shown = cli("context", "explain", file, "-b", chat_model, "--window", 4, "--html", page)
    assert shown.code == 0 and f"written to {page}" in shown.err
    assert "together" in shown.out and "in rhymes" not in shown.out
    text = page.read_text(encoding="utf-8")
    assert "<b>kind</b>" not in text  # what the dialogue says stays text
    assert "http" not in text  # it needs nothing else
    spans = re.findall(r'<span class="(\w+)[^"]*"\s+title="([^"]*)">([^<]*)</span>', text)
    report = explained(cli, file, "-b", chat_model, "--window", 4)
    assert [(tier, html.unescape(said)) for tier, _, said in spans] == [
        (d["tier"], d["text"]) for d in report["decisions"]
    ]
    assert any("rule &#39;Always&#39;" in title for _, title, _ in spans)
    for tier, n_bytes in report["n_bytes"].items():
        assert tier in text and f'<td class="number">{n_bytes}</td>' in text
    outcome = cli("context", "explain", file, "-b", chat_model, "--html", tmp_path / "no" / "x")
    assert (outcome.code, outcome.out) == (1, "")


@pytest.mark.parametrize(
    ("content", "arguments", "error"),
    [
        (b"", (), "InvalidRequestError: messages"),
        (b"[]", (), "InvalidRequestError: messages"),
        (b"{", (), "InvalidRequestError: file: expected a JSON message"),
        (b'{"role": "user", "content": "x"}\nnonsense\n', (), "line 2"),
        (b"[1]", (), "InvalidRequestError: messages[0]"),
        (b'{"role": "wizard", "content": "x"}', (), "messages[0].role"),
        (b'{"role": "user", "content": "x", "tier": "gold"}', (), "messages[0].tier"),
        (b"\xff\xfe", (), "UTF-8"),
        (
            b'{"role": "user", "content": "x"}',
            ("--budget", "much"),
            "InvalidRequestError: --budget",
        ),
        (b'{"role": "user", "content": "x"}', ("--window", "-1"), "window_tokens"),
    ],
)
def test_wrong_input(
    content: bytes,
    arguments: tuple[str, ...],
    error: str,
    cli: Cli,
    chat_model: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    outcome = cli("context", "explain", file, "-b", chat_model, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert error in outcome.err and "Traceback" not in outcome.err


def test_missing_files(cli: Cli, chat_model: Path, file: Path, tmp_path: Path) -> None:
    outcome = cli("context", "explain", tmp_path / "none.jsonl", "-b", chat_model)
    assert (outcome.code, outcome.out) == (2, "") and "a readable file" in outcome.err
    outcome = cli("context", "explain", file, "-b", "no-such-base")
    assert (outcome.code, outcome.out) == (1, "") and "BaseNotFoundError" in outcome.err
