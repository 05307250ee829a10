"""From a run to a pack that the engine answers with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modularbase import Engine
from modularbase.errors import InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.pack_evaluation import PackMeasure
from modularbase.packs.build import build
from modularbase.packs.manifest import ExpertType, Origin, Training
from modularbase.packs.pack_file import read_pack
from modularbase.packs.project import WEIGHTS_FOLDER, read_manifest
from modularbase.training.data import TokenBlocks, pack_blocks, split_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.export import check_target, export_pack, save_result, write_weights
from modularbase.training.fit import FitReport, fit
from modularbase.training.options import TrainOptions
from modularbase.training.texts import read_documents
from tests.conftest import TinyModelFactory
from tests.python.training.toy import LONGER, make_project, toy_options


@pytest.fixture(scope="module")
def run(
    tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainOptions, FitReport]:
    """A finished run."""
    project = tmp_path_factory.mktemp("export") / "toy"
    make_project(project, tiny_model())
    options = toy_options(project, tiny_model(), **LONGER)
    return options, fit(options)


def heldout(options: TrainOptions) -> TokenBlocks:
    """What the run measured on."""
    encoder = Encoder(read_metadata(options.base))
    blocks = pack_blocks(read_documents(options.data), encoder, options.block_tokens)
    share, most = options.heldout_share, options.heldout_blocks
    return split_blocks(blocks, share=share, most=most, seed=options.seed, kind="data").heldout


@pytest.mark.parametrize("experts", ["f16", "q8_0", "q4_0", "q4_k"])
def test_the_engine_has_the_perplexity_of_the_twin(
    experts: ExpertType, run: tuple[TrainOptions, FitReport], tmp_path: Path
) -> None:
    options, report = run
    manifest = read_manifest(options.project)
    facts = export_pack(tmp_path / "a.gguf", report.pack, manifest, experts=experts)
    assert (facts.expert_type, facts.has_token_gates) == (experts, True)
    with Engine.load(options.base, dtype="f32", n_threads=1) as engine:
        engine.packs.load(str(tmp_path / "a.gguf"))
        blocks = heldout(options).ids.tolist()
        scores = [engine.score(ids, packs=[manifest.id]).logprobs for ids in blocks]
    perplexity = math.exp(-float(np.concatenate(scores).mean()))
    # What the issue asks for; rounding experts to 4 bits costs the most of it.
    assert perplexity == pytest.approx(report.figures["perplexity"], rel=5e-3)
    assert perplexity < 0.1 * report.base["perplexity"]


def test_a_project_is_built_from_what_was_trained(run: tuple[TrainOptions, FitReport]) -> None:
    options, report = run
    before = read_manifest(options.project)
    weights = save_result(options, report, command="modularbase train fit", licence="CC0-1.0")
    assert weights.parent == options.project / WEIGHTS_FOLDER
    manifest = read_manifest(options.project)
    told = manifest.training
    assert (told.command, told.seed, told.data_licence) == ("modularbase train fit", 0, "CC0-1.0")
    assert (told.n_steps, told.n_tokens) == (report.n_steps, report.n_tokens)
    assert [Path(name).name for name in told.data] == ["domain.txt", "neutral.txt"]
    figures = manifest.evaluation
    assert figures["heldout perplexity"] == report.figures["perplexity"]
    assert figures["heldout perplexity of the base"] == report.base["perplexity"]
    assert figures["heldout neutral kl"] == report.figures["neutral_kl"]
    assert manifest.id == before.id and manifest.quantisation == before.quantisation
    with Engine.load(options.base, dtype="f32", n_threads=1) as engine:
        built = build(options.project, PackMeasure(engine, "acute fever"))
    assert built.manifest.training == told and built.gguf is not None
    stored = read_pack(built.gguf)
    assert stored.probe is not None and max(stored.probe.effect) > 0.1
    exact = report.pack.to_arrays()
    assert stored.tensors.keys() == exact.keys()
    for name, array in stored.tensors.items():
        error = np.linalg.norm(array - exact[name]) / np.linalg.norm(exact[name])
        assert error < 0.15  # of 4-bit experts


def test_what_the_manifest_knows_better_stays(run: tuple[TrainOptions, FitReport]) -> None:
    options, report = run
    manifest = read_manifest(options.project)
    origin = Origin(id="toy", version="0.0.1", digest="sha256:" + "0" * 64)
    training = Training(derived_from=origin, data_licence="CC-BY-4.0")
    write_weights(options.project, report.pack, manifest.model_copy(update={"training": training}))
    save_result(options, replace(report, figures={"perplexity": math.inf}))
    found = read_manifest(options.project)
    assert found.training.derived_from == training.derived_from
    assert found.training.data_licence == "CC-BY-4.0"
    assert found.training.n_steps == report.n_steps
    assert found.evaluation["heldout perplexity of the base"] == report.base["perplexity"]


def test_weights_of_others_are_not_left_beside(tmp_path: Path) -> None:
    check_target(tmp_path)
    folder = tmp_path / WEIGHTS_FOLDER
    folder.mkdir()
    (folder / "trained.safetensors").touch()
    check_target(tmp_path)
    (folder / "random.npz").touch()
    with pytest.raises(InvalidRequestError, match=r"random\.npz"):
        check_target(tmp_path)
