"""`modularbase train`, as its entry point runs it."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from modularbase.packs.project import CONFIG_FILE, read_manifest
from modularbase.training.options import PartRates
from modularbase.training.run_folder import RunFolder
from modularbase.training.trainer import Trainer
from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.training.toy import make_project

SHORT = ("--steps", 6, "--batch-blocks", 4, "--block-tokens", 32, "--precision", "f32")


@pytest.fixture
def project(tmp_path: Path, tiny_model: TinyModelFactory) -> Path:
    """A project whose train.toml names the base's file."""
    model = tiny_model()
    folder = tmp_path / "toy"
    make_project(folder, model)
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace(f'"{model.path.stem}"', f'"{model.path}"'))
    return folder


def arguments(project: Path) -> tuple[object, ...]:
    """A short run with domain and neutral text."""
    texts = ("--data", project / "domain.txt", "--neutral", project / "neutral.txt")
    return ("train", "fit", project, *texts, *SHORT)


def test_fit_prints_figures_and_leaves_weights(cli: Cli, project: Path) -> None:
    shown = cli(*arguments(project), "--seed", 3, "--data-licence", "CC0-1.0", "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["n_steps"] == 6 and facts["n_tokens"] == 6 * 4 * 32
    assert facts["pack"]["perplexity"] < facts["base"]["perplexity"]
    assert Path(facts["weights"]).is_file() and Path(facts["run"], "curves.png").is_file()
    assert "loss" in shown.err and "tokens/s" in shown.err and "no --neutral" not in shown.err
    training = read_manifest(project).training
    assert training.seed == 3 and training.data_licence == "CC0-1.0"
    assert training.command.startswith("modularbase train fit ")
    options = RunFolder(Path(facts["run"])).options()
    assert options.learning_rate == 1e-3  # of train.toml
    assert options.rates == PartRates() and options.qat_steps == 0
    table = cli(*arguments(project), "--rate", "w_in=2", "--rate", "experts=0", "--qat-steps", 2)
    assert table.code == 0 and "pack perplexity" in table.out
    assert "start perplexity" not in table.out
    options = RunFolder.latest(project).options()
    assert options.rates == PartRates(w_in=2.0, experts=0.0) and options.qat_steps == 2


def test_a_run_without_neutral_text_says_so(cli: Cli, project: Path) -> None:
    shown = cli("train", "fit", project, "--data", project / "domain.txt", *SHORT, "--json")
    assert shown.code == 0 and "no --neutral" in shown.err
    assert "neutral_kl" not in json.loads(shown.out)["pack"]


def test_an_engine_may_run_the_lower_half(cli: Cli, project: Path) -> None:
    shown = cli(*arguments(project), "--from-engine", "--threads", 1, "--json")
    assert shown.code == 0, shown.err
    assert "engine" in shown.err and "home/states/" in shown.err
    facts = json.loads(shown.out)
    assert RunFolder(Path(facts["run"])).options().from_engine
    small = cli(*arguments(project), "--from-engine", "--state-cache", "1kB")
    assert small.code == 1 and "the limit is 1000" in small.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_resumed(
    number: int, code: int, cli: Cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.train_step

    def press(self: Any) -> dict[str, float]:
        if self.step == 2:
            signal.raise_signal(number)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", press)
        stopped = cli(*arguments(project))
    assert stopped.code == code and "--resume" in stopped.err
    assert cli("train", "fit", project, "--resume", "--steps", 9).code == 2
    shown = cli("train", "fit", project, "--resume", "--json")
    assert shown.code == 0 and json.loads(shown.out)["n_steps"] == 6


def test_what_goes_wrong_is_said(
    cli: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for code, given in (
        (2, ("train", "fit", project, "--resume")),
        (2, (*arguments(project), "--data", tmp_path / "nowhere")),
        (2, (*arguments(project), "--lr", "0")),
        (2, (*arguments(project), "--rate", "w_on=2")),
        (2, (*arguments(project), "--rate", "w_in")),
        (1, ("train", "fit", tmp_path / "nowhere")),
        (1, (*arguments(project), "--base", "nobody")),
    ):
        shown = cli(*given)
        assert (shown.code, shown.out) == (code, ""), given
        assert "rror" in shown.err and "Traceback" not in shown.err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name)
    )
    shown = cli(*arguments(project))
    assert shown.code == 1 and "tensorboard" in shown.err and "modularbase[train]" in shown.err
