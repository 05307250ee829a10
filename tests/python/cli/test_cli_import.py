"""`modularbase base import`, and what the other commands say of an imported base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from modularbase.gguf_file import read_metadata
from tests.tools.tiny_checkpoints import make_tiny_checkpoint

if TYPE_CHECKING:
    from tests.python.cli.conftest import Cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("made") / "Sea", "qwen3").folder


def test_import(cli: Cli, folder: Path) -> None:
    done = cli("base", "import", folder, "--version", "1.1", "--json")
    assert done.code == 0 and "sea@1.1 is installed" in done.err
    facts = json.loads(done.out)
    assert facts["name"] == "sea@1.1" and facts["family"] == "qwen3"
    assert cli("generate", "-b", "sea", "--raw", "-p", "sea", "-n", 2, "-t", 1).code == 0
    listed = json.loads(cli("base", "list", "--json").out)
    assert [entry["path"] for entry in listed if entry["name"] == "sea@1.1"] == [facts["path"]]
    assert cli("base", "remove", "sea@1.1").code == 0
    assert cli("base", "info", "sea@1.1").code == 1


def test_to_a_file(cli: Cli, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "sea.gguf"
    done = cli("base", "import", folder, "--type", "bf16", "--name", "ocean", "--out", path)
    assert (done.code, done.out) == (0, "") and "written" in done.err
    assert read_metadata(path)["general.name"] == "ocean"
    assert "ocean" not in cli("base", "list").out


def test_a_folder_that_is_no_checkpoint(cli: Cli, tmp_path: Path) -> None:
    failed = cli("base", "import", tmp_path / "nothing")
    assert (failed.code, failed.out) == (1, "") and "BaseLoadError" in failed.err
    assert cli("base", "import", tmp_path, "--name", "No Name").code == 2
