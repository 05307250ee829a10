"""The last steps with rounded weights: what is trained and measured is what is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modularbase.errors import InvalidRequestError
from modularbase.packs.manifest import ExpertType, Quantisation
from modularbase.packs.pack_file import read_pack, rounded
from modularbase.packs.project import read_manifest
from modularbase.training.export import export_pack
from modularbase.training.fit import FitReport, fit, no_state_watch, resume
from modularbase.training.objective import NextToken
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.preparation import prepare
from modularbase.training.rounding import Rounding
from tests.conftest import TinyModelFactory
from tests.python.training.toy import GEOMETRY, make_project, toy_options

ROUGH = Quantisation(experts="q4_0", adapters="f16")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModelFactory) -> TrainOptions:
    """A short run at a high rate, behind which rounding costs a lot."""
    project = tmp_path_factory.mktemp("rounding") / "toy"
    make_project(project, tiny_model())
    return toy_options(project, tiny_model(), steps=14, eval_every=2, qat_steps=6)


@pytest.fixture(scope="module")
def report(options: TrainOptions) -> FitReport:
    """That run."""
    return fit(options)


def shipped(options: TrainOptions, pack: PackModule, folder: Path, experts: ExpertType) -> float:
    """Held-out perplexity of a pack file, by the twin."""
    path = folder / f"{experts}.gguf"
    export_pack(path, pack, read_manifest(options.project), experts=experts)
    trainer, fresh = prepare(replace(options, qat_steps=0), NextToken(), no_state_watch)
    fresh.load_arrays(read_pack(path).tensors)
    return trainer.measure().figures()["perplexity"]


def test_the_figures_are_those_of_the_file(
    options: TrainOptions, report: FitReport, tmp_path: Path
) -> None:
    assert report.best_step > options.qat_start
    found = shipped(options, report.pack, tmp_path, "q4_0")
    assert found == pytest.approx(report.figures["perplexity"], rel=1e-6)


def test_rounding_costs_less_than_without(
    options: TrainOptions, report: FitReport, tmp_path: Path
) -> None:
    plain = fit(replace(options, qat_steps=0)).pack
    lost = {}
    for name, pack in (("aware", report.pack), ("plain", plain)):
        (tmp_path / name).mkdir()
        exact, rough = (shipped(options, pack, tmp_path / name, t) for t in ("f16", "q4_0"))
        lost[name] = rough / exact - 1
    assert lost["aware"] < lost["plain"], lost


def test_weights_are_rounded_inside_and_exact_behind() -> None:
    pack = PackModule(GEOMETRY, seed=1)
    before = pack.to_arrays()
    with pytest.raises(ConnectionError), Rounding(pack, ROUGH, has_parent=False).applied():
        for name, array in pack.to_arrays().items():
            part = name.split(".")[2]
            wanted: Any = "q4_0" if "expert" in part else "f16" if part in ("in", "out") else "f32"
            assert (array == rounded(before[name], wanted)).all(), name
        raise ConnectionError
    assert all((array == before[name]).all() for name, array in pack.to_arrays().items())


def test_gradients_pass_straight_through() -> None:
    pack = PackModule(GEOMETRY, seed=1)
    with torch.no_grad():
        pack.sites[0].w_out.normal_()
    x = torch.randn(5, GEOMETRY.n_embd, generator=torch.Generator().manual_seed(0))
    with Rounding(pack, ROUGH, has_parent=False).applied():
        there = PackModule(GEOMETRY)
        there.load_arrays(pack.to_arrays())
        pack.sites[0](x).delta.square().sum().backward()
        there.sites[0](x).delta.square().sum().backward()
    for mine, other in zip(pack.sites[0].parameters(), there.sites[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_frozen_parts_of_a_parent_are_left_alone() -> None:
    pack = PackModule(GEOMETRY, seed=1)
    frozen = pack.sites[0].expert_up.requires_grad_(False)
    with Rounding(pack, ROUGH, has_parent=True).applied():
        assert torch.equal(pack.sites[0].expert_up, PackModule(GEOMETRY, seed=1).sites[0].expert_up)
        assert frozen.data_ptr() == pack.sites[0].expert_up.data_ptr()
    with Rounding(pack, ROUGH, has_parent=False).applied():
        fresh = PackModule(GEOMETRY, seed=1).sites[0].expert_up
        assert not torch.equal(pack.sites[0].expert_up, fresh)


def test_the_best_is_one_of_the_rounded(options: TrainOptions) -> None:
    # At this rate the first step is the best of all.
    wild = replace(options, steps=6, qat_steps=3, eval_every=1, learning_rate=2.0)
    assert fit(replace(wild, qat_steps=0)).best_step < wild.qat_start
    assert fit(wild).best_step >= wild.qat_start


def test_resumed_in_the_middle_it_is_the_same(options: TrainOptions, report: FitReport) -> None:
    def crash(seen: Any) -> None:
        if seen.step == 12:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fit(replace(options, save_every=10), crash)
    again = resume(options.project)
    assert (again.figures, again.best_step) == (report.figures, report.best_step)


def test_steps_that_make_no_sense(options: TrainOptions) -> None:
    for n in (-1, options.steps + 1):
        with pytest.raises(InvalidRequestError, match="qat_steps"):
            replace(options, qat_steps=n)
