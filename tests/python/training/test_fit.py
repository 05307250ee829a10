"""Whole runs on a toy domain: that they learn, resume exactly, and end well."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modularbase.errors import InvalidRequestError, PackFormatError, TrainingError
from modularbase.packs.project import CONFIG_FILE
from modularbase.training.evaluation import HeldOut, Measurement
from modularbase.training.fit import FitReport, StepReport, fit, resume
from modularbase.training.optimiser import rate_factor
from modularbase.training.options import PartRates, TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.run_folder import RunFolder
from modularbase.training.trainer import Trainer
from tests.conftest import TinyModelFactory
from tests.python.training.toy import LONGER, make_project, toy_options

_TIMES = ("tokens_per_s",)


@pytest.fixture
def options(tmp_path: Path, tiny_model: TinyModelFactory) -> TrainOptions:
    """A short run on a fresh project."""
    model = tiny_model()
    make_project(tmp_path / "toy", model)
    return toy_options(tmp_path / "toy", model)


def rows(project: Path, run: str = "fit-001") -> list[dict[str, Any]]:
    """A run's figures without times."""
    lines = (project / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in _TIMES}
        for line in lines
    ]


def crash() -> None:
    """Ends a run as if it were killed."""
    raise ConnectionError


def stop_at(step: int, act: Callable[[], None]) -> Callable[[StepReport], None]:
    """A watch that does something behind a step."""

    def watch(report: StepReport) -> None:
        if report.step == step:
            act()

    return watch


def test_a_run_learns_the_domain_and_leaves_neutral_text_alone(options: TrainOptions) -> None:
    seen: list[StepReport] = []
    options = replace(options, **LONGER)
    report = fit(options, seen.append)
    # Eight words drawn at random: ln 8 / 6 characters = 0.35 nats; the base knows nothing (5.8).
    assert report.base["perplexity"] > 200
    assert report.figures["perplexity"] < 0.1 * report.base["perplexity"]
    assert (report.n_steps, report.stopped_early) == (40, False)
    assert report.n_tokens == 40 * 8 * 32
    assert [step.step for step in seen] == list(range(41))
    assert seen[0].loss is None and seen[0].tokens_per_s == 0
    assert seen[-1].loss is not None and seen[-1].loss < seen[1].heldout_loss
    without = fit(replace(options, kl_weight=0.0))
    # Of a random base, which knows nothing that the pack could keep, most of the harm is away.
    assert report.figures["neutral_kl"] < 0.2 * without.figures["neutral_kl"]


def test_a_run_leaves_its_figures(options: TrainOptions) -> None:
    report = fit(options)
    assert report.run == options.project / "runs" / "fit-001"
    found = rows(options.project)
    assert [row["step"] for row in found if row["kind"] == "heldout"] == [0, 4, 8, 12, 16]
    train = [row for row in found if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 17))
    assert {"loss", "neutral_kl", "balance", "z_loss", "grad_norm", "learning_rate"} <= set(
        train[0]
    )
    assert (report.run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((report.run / "tensorboard").glob("events.*"))
    assert RunFolder(report.run).options() == options
    fit(options)  # in a folder of its own
    assert rows(options.project, "fit-002") == found


def test_a_resumed_run_is_the_same_as_one_that_did_not_stop(options: TrainOptions) -> None:
    whole = fit(options)
    expected = rows(options.project)
    with pytest.raises(ConnectionError):
        fit(options, stop_at(13, crash))
    assert rows(options.project, "fit-002")[-1]["step"] == 13
    again = resume(options.project)  # from the checkpoint of step 8
    assert again.run.name == "fit-002"
    assert rows(options.project, "fit-002") == expected
    assert_same(again, whole)
    assert_same(resume(options.project), whole)  # a finished run has nothing left to do


def assert_same(found: FitReport, expected: FitReport) -> None:
    """Equal bits, times apart."""
    assert replace(found, run=expected.run, pack=expected.pack) == expected
    pairs = zip(found.pack.parameters(), expected.pack.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(options: TrainOptions) -> None:
    options = replace(options, steps=4)
    with pytest.raises(ConnectionError):
        fit(options, stop_at(3, crash))
    resume(options.project)
    found = rows(options.project)
    fit(options)
    assert rows(options.project, "fit-002") == found


def test_ctrl_c_leaves_a_checkpoint_of_the_step(options: TrainOptions) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        fit(options, stop_at(6, lambda: signal.raise_signal(signal.SIGINT)))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    folder = RunFolder.latest(options.project)
    state = folder.load()
    assert state is not None and state["step"] == 6
    assert folder.curves.exists()
    resume(options.project)
    found = rows(options.project)
    fit(options)
    assert rows(options.project, "fit-002") == found


def test_sigterm_ends_a_run_like_ctrl_c(options: TrainOptions) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(options, stop_at(3, lambda: signal.raise_signal(signal.SIGTERM)))
    assert caught.value.code == 143
    state = RunFolder.latest(options.project).load()
    assert state is not None and state["step"] == 3


def test_a_second_ctrl_c_does_not_wait(options: TrainOptions) -> None:
    def press() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(options, stop_at(10, press))
    state = RunFolder.latest(options.project).load()
    assert state is not None and state["step"] == 8


def test_runs_beside_the_main_thread(options: TrainOptions) -> None:
    found: list[FitReport] = []
    thread = threading.Thread(target=lambda: found.append(fit(replace(options, steps=2))))
    thread.start()
    thread.join()
    assert found[0].n_steps == 2


def test_a_run_that_gets_no_better_ends(options: TrainOptions) -> None:
    patient = replace(options, learning_rate=2.0, eval_every=1, patience=3, steps=30)
    report = fit(patient)
    found = [row for row in rows(options.project) if row["kind"] == "heldout"]
    totals = [row["loss"] + row["neutral_kl"] for row in found]
    assert report.stopped_early and report.n_steps == report.best_step + 3 < 30
    assert totals[report.best_step] == min(totals)
    assert report.figures["perplexity"] == found[report.best_step]["perplexity"]
    state = RunFolder(report.run).load()
    assert state is not None
    for name, value in report.pack.state_dict().items():
        assert torch.equal(value, state["best_weights"][name])
    assert not torch.equal(report.pack.sites[0].w_out, state["weights"]["sites.0.w_out"])


def test_the_best_is_the_best_at_all_that_is_trained(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lowest loss on the domain, at step 2, is bought with neutral text.
    figures = ((2.0, 0.0), (1.0, 0.5), (0.9, 0.7))
    found = iter(Measurement({"loss": loss}, 2.0, kl) for loss, kl in figures)
    monkeypatch.setattr(HeldOut, "measure", lambda self: next(found))
    assert fit(replace(options, steps=2, eval_every=1)).best_step == 1


def test_patience_goes_on_where_a_run_stopped(options: TrainOptions) -> None:
    patient = replace(options, learning_rate=2.0, eval_every=1, save_every=1, patience=3)
    patient = replace(patient, steps=30)
    whole = fit(patient)
    assert whole.stopped_early
    with pytest.raises(ConnectionError):
        fit(patient, stop_at(whole.n_steps - 1, crash))
    assert_same(resume(options.project), whole)


def test_accumulation_changes_nothing_but_rounding(options: TrainOptions) -> None:
    # The router's losses are means over a piece, so they do differ.
    plain = replace(options, steps=4, balance_weight=0.0, z_weight=0.0)
    fit(plain)
    fit(replace(plain, accumulation=3))
    for whole, pieces in zip(rows(options.project), rows(options.project, "fit-002"), strict=True):
        assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        if whole["kind"] == "train":
            assert pieces["balance"] == pytest.approx(whole["balance"], rel=0.1)
        if whole["kind"] == "train" and whole["step"] == 1:
            assert pieces["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_bf16_learns_alike(options: TrainOptions) -> None:
    exact = fit(options)
    narrow = fit(replace(options, precision="bf16"))
    assert narrow.figures != exact.figures
    assert narrow.figures["perplexity"] == pytest.approx(
        exact.figures["perplexity"], rel=0.05
    )  # 8 bits of mantissa


def test_frozen_parts_stay_bit_for_bit(options: TrainOptions) -> None:
    rates = PartRates(w_in=0.0, experts=0.0, norm=0.0)
    # So heavy a decay would show in a part that is not frozen.
    heavy = replace(options, steps=3, rates=rates, eval_every=1, weight_decay=10.0)
    report = fit(heavy)
    start = PackModule(report.pack.geometry, seed=options.seed)
    frozen = {"in", "norm", "expert_gate", "expert_up", "expert_down"}
    pairs = zip(report.pack.named_tensors(), start.named_tensors(), strict=True)
    for (name, found), (_, before) in pairs:
        is_frozen = name.split(".")[2] in frozen
        assert found.requires_grad != is_frozen
        assert torch.equal(found, before) == is_frozen, name
    state = RunFolder(report.run).load()
    assert state is not None
    n_trained = sum(parameter.requires_grad for parameter in report.pack.parameters())
    assert len(state["optimiser"]["adamw"]["state"]) == n_trained == 8


def test_something_must_be_trained(options: TrainOptions) -> None:
    nothing = dict.fromkeys(("w_in", "norm", "router", "experts", "w_out", "token_gate"), 0.0)
    with pytest.raises(InvalidRequestError, match="rates"):
        PartRates(**nothing)
    with pytest.raises(InvalidRequestError, match=r"rates\.norm"):
        PartRates(norm=-1.0)
    config = options.project / CONFIG_FILE
    config.write_text(config.read_text().replace("token_gates = true", "token_gates = false"))
    with pytest.raises(InvalidRequestError, match="rates"):
        fit(replace(options, rates=PartRates(**{**nothing, "token_gate": 1.0})))


def test_a_loss_that_is_not_finite_ends_the_run(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._backward

    def spoilt(self: Any, piece: Any, whole: Any) -> dict[str, float]:
        figures = real(self, piece, whole)
        return figures if self.step < 12 else {**figures, "loss": float("nan")}

    monkeypatch.setattr(Trainer, "_backward", spoilt)
    with pytest.raises(TrainingError, match="step 13"):
        fit(options)
    state = RunFolder.latest(options.project).load()
    assert state is not None and state["step"] == 8


def test_other_text_cannot_be_resumed_with(options: TrainOptions) -> None:
    fit(replace(options, steps=2))
    (options.project / "domain.txt").write_text("something else " * 2000)
    with pytest.raises(InvalidRequestError, match="began with"):
        resume(options.project)


def test_spoilt_runs_are_refused(options: TrainOptions) -> None:
    with pytest.raises(InvalidRequestError, match="resume"):
        resume(options.project)
    run = fit(replace(options, steps=1)).run
    (run / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(InvalidRequestError, match=r"checkpoint\.pt"):
        resume(options.project)
    (run / "options.json").write_text('{"steps": "many"}')
    with pytest.raises(InvalidRequestError, match="options"):
        resume(options.project)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("block_tokens", 1),
        ("learning_rate", float("nan")),
        ("kl_weight", -1.0),
        ("neutral_share", 1.0),
        ("accumulation", 4),
    ],
)
def test_options_that_make_no_sense(field: str, value: Any, options: TrainOptions) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        replace(options, **{field: value})


def test_text_and_sites_must_suit(options: TrainOptions) -> None:
    (options.project / "short.txt").write_text("short")
    short = (options.project / "short.txt",)
    for field, told in (
        ("data", replace(options, data=short)),
        ("neutral", replace(options, neutral=short)),
    ):
        with pytest.raises(InvalidRequestError, match=field):
            fit(told)
    config = options.project / CONFIG_FILE
    content = config.read_text()
    config.write_text(content.replace("sites = [1, 2]", "sites = [1, 3]"))
    with pytest.raises(InvalidRequestError, match="sites"):
        fit(options)
    config.unlink()
    with pytest.raises(PackFormatError):
        fit(options)
    assert not (options.project / "runs").exists()


def test_answers_are_learnt_and_prompts_are_not(options: TrainOptions, chat_model: Path) -> None:
    told = [{"prompt": f"{i} " * 9, "response": "acute fever of the left knee"} for i in range(150)]
    rows_file = options.project / "answers.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in told))
    options = replace(options, base=chat_model, data=(rows_file,), neutral=(), eval_every=16)
    report = fit(options)
    # The answer is always the same one; of the prompts, digits would be left to guess.
    assert report.figures["perplexity"] < 0.2 * report.base["perplexity"]


def test_held_out_text_of_ones_own(options: TrainOptions) -> None:
    held = options.project / "heldout.txt"
    held.write_text("acute fever of the left knee\n" * 20)
    report = fit(replace(options, heldout=(held,), steps=1))
    assert report.base["perplexity"] != fit(replace(options, steps=1)).base["perplexity"]


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100, 10) for step in range(100)]
    assert factors[:11] == sorted(factors[:11]) and factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1 and factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert rate_factor(0, 1, 50) == 1  # a warm-up is a fifth of a run at most
