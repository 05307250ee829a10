"""The alignment experiment on a tiny base: all cases, the same ones again, and what recovery is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.align.__main__ import main, settings_of, tables, told
from benchmarks.align.continued import train_next_base
from benchmarks.align.experiment import Outcome
from benchmarks.align.scale import Row
from tests.conftest import TinyModelFactory
from tests.python.training.toy import make_project

SMALL = {
    "base_steps": 4,
    "base_rate": 0.01,
    "fit_steps": 6,
    "align_steps": 2,
    "align_rates": "1e-4,1e-3",
    "batch_blocks": 4,
    "align_batch_blocks": 2,
    "block_tokens": 32,
    "measured_blocks": 4,
    "eval_every": 10,
}


def row(loss: float, n_tokens: int = 0) -> Row:
    return Row("", n_tokens, loss, loss)


def test_recovery() -> None:
    outcome = Outcome(
        plain=row(3.0),
        next_plain=row(3.1),
        made_for=row(1.0, 1000),
        unaligned=row(2.0),
        aligned=row(1.2, 100),
        anew=row(1.1, 1000),
    )
    assert outcome.recovery(outcome.made_for) == pytest.approx(0.8)
    assert outcome.recovery(outcome.anew) == pytest.approx(0.8 / 0.9)
    assert math.isnan(outcome.recovery(outcome.plain)), "nothing was lost"
    cases, summary = tables(outcome)
    assert [len(cases.rows), len(summary.rows)] == [6, 3]
    assert summary.rows[2][1] == "10.0%"


def test_a_small_run(tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    base = tiny_model().path
    make_project(tmp_path / "toy", tiny_model())
    for name, source in (("medical", "domain.txt"), ("neutral", "neutral.txt")):
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        text = (tmp_path / "toy" / source).read_text()
        for part in ("train", "heldout", "test"):
            (folder / f"{part}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    work, output = tmp_path / "work", tmp_path / "output"
    given = {"base": base, "texts": tmp_path / "texts", "work": work, "output": output, **SMALL}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert main(options) == 0
    assert "aligned" in (output / "align.md").read_text()
    cases = json.loads((output / "align.json").read_text())["cases"]
    losses = [case["loss"] for case in cases]
    assert len(set(losses)) == 6 and all(map(math.isfinite, losses))
    plain, next_plain, made_for, unaligned, _, anew = losses
    assert made_for < plain and anew < next_plain and unaligned > made_for
    tokens = [case["n_tokens"] for case in cases]
    assert tokens == [0, 0, 6 * 4 * 32, 0, 2 * 2 * 32, 6 * 4 * 32]
    settings, _ = settings_of(options)
    train_next_base(settings, work / "again.gguf", lambda _: None)
    assert (work / "again.gguf").read_bytes() == (work / "next.gguf").read_bytes()


def test_results_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    settings, _ = settings_of([f"--base={tmp_path / 'base.gguf'}", f"--work={tmp_path / 'work'}"])
    found = told(settings)
    assert (found["base"], found["texts"], found["work"]) == ("base.gguf", ".cache/texts", "work")
    assert found["base_rate"] == "0.0003"
