"""`modularbase train align` and `train gate`, as the entry point runs them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from modularbase.packs.project import read_manifest
from modularbase.training.trainer import Trainer
from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.training.toy import make_project
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_models import N_EMBD
from tests.tools.tiny_packs import write_tiny_pack

SHORT = ("--steps", 2, "--batch-blocks", 4, "--block-tokens", 32, "--precision", "f32")


@pytest.fixture
def place(tmp_path: Path, tiny_model: TinyModelFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two bases, a pack for the older one, and text."""
    monkeypatch.chdir(tmp_path)
    for version in ("1.0.0", "1.1.0"):
        changes = {"general.name": "tiny", "general.version": version}
        copy_gguf(tiny_model().path, tmp_path / f"tiny-{version}.gguf", changes=changes)
    manifest = {"base_id": "tiny", "base_compatibility": ("==1.0.0",)}
    write_tiny_pack(tmp_path / "old.gguf", n_embd=N_EMBD, sites=(1, 2), manifest=manifest)
    make_project(tmp_path / "texts", tiny_model())
    return tmp_path


def arguments(name: str, base: str) -> tuple[object, ...]:
    """A short run of a stage."""
    texts = ("--data", "texts/domain.txt", "--neutral", "texts/neutral.txt")
    return ("train", name, "old.gguf", "--base", base, *texts, *SHORT)


def test_align_makes_the_project_of_the_next_version(cli: Cli, place: Path) -> None:
    shown = cli(*arguments("align", "tiny-1.1.0.gguf"), "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["n_steps"] == 2 and facts["start"]["perplexity"] > 0
    manifest = read_manifest(place / "tiny_pack-1.1.0")
    assert manifest.base_compatibility == ("==1.1.0",)
    training = manifest.training
    assert training.derived_from is not None and training.derived_from.version == "1.0.0"
    assert training.data == ("texts/domain.txt", "neutral: texts/neutral.txt")
    assert training.command.startswith("modularbase train align old.gguf")
    built = cli("pack", "build", "tiny_pack-1.1.0", "--base", "tiny-1.1.0.gguf", "--json")
    assert built.code == 0, built.err
    assert json.loads(built.out)["version"] == "1.1.0"


def test_gate_names_version_and_folder_as_told(cli: Cli, place: Path) -> None:
    where = ("--folder", "gated", "--version", "1.0.1")
    shown = cli(*arguments("gate", "tiny-1.0.0.gguf"), *where)
    assert shown.code == 0, shown.err
    assert "start perplexity" in shown.out
    assert read_manifest(place / "gated").version == "1.0.1"


def test_an_interrupted_stage_is_resumed(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.train_step

    def press(self: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", press)
        stopped = cli(*arguments("align", "tiny-1.1.0.gguf"))
    assert stopped.code == 130 and "train fit tiny_pack-1.1.0 --resume" in stopped.err
    monkeypatch.chdir(place / "texts")
    shown = cli("train", "fit", place / "tiny_pack-1.1.0", "--resume", "--json")
    assert shown.code == 0 and json.loads(shown.out)["n_steps"] == 2
    found = read_manifest(place / "tiny_pack-1.1.0").evaluation
    assert "heldout perplexity of the parent" in found


def test_what_goes_wrong_is_said(cli: Cli, place: Path) -> None:
    for code, told, given in (
        (1, "1.1.0", arguments("gate", "tiny-1.1.0.gguf")),
        (1, "nobody", ("train", "align", "nobody", "--base", "tiny-1.1.0.gguf")),
        (2, "data", ("train", "align", "old.gguf", "--base", "tiny-1.1.0.gguf")),
        (2, "base", ("train", "align", "old.gguf")),
    ):
        shown = cli(*given)
        assert (shown.code, shown.out) == (code, ""), given
        assert told in shown.err and "Traceback" not in shown.err
