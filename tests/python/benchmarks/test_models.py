"""The model files are the ones the benchmarks are defined on, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import models
from benchmarks.digest import sha256_of


def made_file(folder: Path) -> Path:
    path = folder / "model.F16.gguf"
    path.write_bytes(b"weights")
    stamp = {"source_sha256": models.BASE_SHA256, "n_bytes": 7, "sha256": sha256_of(path)}
    path.with_suffix(".json").write_text(json.dumps(stamp))
    return path


def test_a_made_file_is_used_again(tmp_path: Path) -> None:
    assert models.is_verified(made_file(tmp_path))


def test_a_changed_truncated_or_missing_file_is_not(tmp_path: Path) -> None:
    path = made_file(tmp_path)
    path.write_bytes(b"weighty")
    assert not models.is_verified(path)
    path.write_bytes(b"w")
    assert not models.is_verified(path)
    path.unlink()
    assert not models.is_verified(path)


def test_a_file_made_of_another_base_is_not_used(tmp_path: Path) -> None:
    path = made_file(tmp_path)
    stamp = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**stamp, "source_sha256": "0" * 64}))
    assert not models.is_verified(path)


@pytest.mark.parametrize("content", [None, b"another model"], ids=["missing", "other"])
def test_a_base_that_is_not_the_expected_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "base.gguf"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(models.BASE_VARIABLE, str(path))
    with pytest.raises(models.ModelFileError, match=r"expected .*, found"):
        models.locate_base()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "decode_depth,speed"], "found speed"),
        (["--rounds", "0"], "at least 1"),
        (["--threads", "-1"], "at least 1"),
    ],
)
def test_a_wrong_command_line_says_what_was_expected(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments)
    assert said in capsys.readouterr().err


def test_quick_means_fewer_rounds_unless_they_are_named() -> None:
    assert command.parse_arguments([]).rounds == command.DEFAULT_ROUNDS
    assert command.parse_arguments(["--quick"]).rounds == command.QUICK_ROUNDS
    assert command.parse_arguments(["--quick", "--rounds", "9"]).rounds == 9
    assert command.parse_arguments([]).only == list(command.SUITES)
