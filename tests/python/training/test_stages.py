"""Stages that begin with a pack file: what they train, what they leave byte for byte."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from modularbase.errors import (
    InstallError,
    InvalidRequestError,
    PackFormatError,
    PackIncompatibleError,
)
from modularbase.gguf_file import read_metadata
from modularbase.packs.build import build
from modularbase.packs.derive import ParentPack, open_parent
from modularbase.packs.manifest import Origin
from modularbase.packs.pack_file import inspect_pack, read_pack, unchanged_tensors, write_pack
from modularbase.packs.project import CONFIG_FILE, PARENT_FILE, read_config, read_manifest
from modularbase.packs.weights import PROFILE
from modularbase.storage.digest import sha256_of
from modularbase.training.export import export_pack, save_result
from modularbase.training.fit import fit, resume
from modularbase.training.options import TrainOptions
from modularbase.training.stages import ALIGN, GATE, Stage, begin_stage
from tests.conftest import TinyModelFactory
from tests.python.training.toy import LONGER, make_project, toy_options
from tests.tools.gguf_edit import copy_gguf
from tests.tools.tiny_models import N_EMBD
from tests.tools.tiny_packs import write_tiny_pack

SHORT: dict[str, Any] = {
    "steps": 3,
    "batch_blocks": 4,
    "block_tokens": 32,
    "precision": "f32",
    "heldout_blocks": 2,
    "eval_every": 1,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def bases(tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Version 1.0.0 of a base, and 1.1.0, which differs a little everywhere."""
    folder = tmp_path_factory.mktemp("bases")
    paths = []
    for version in ("1.0.0", "1.1.0"):
        changes = {"general.name": "tiny", "general.version": version}
        paths.append(copy_gguf(tiny_model().path, folder / f"{version}.gguf", changes=changes))
    random = np.random.default_rng(0)
    for tensor in gguf.GGUFReader(paths[1], "r+").tensors:
        noise = random.standard_normal(tensor.data.shape, dtype=np.float32)
        tensor.data[:] += np.float32(0.3) * noise * tensor.data.std()
    return paths


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModelFactory) -> Path:
    """A project with domain.txt and neutral.txt in it."""
    folder = tmp_path_factory.mktemp("texts") / "toy"
    make_project(folder, tiny_model())
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pack with Q4_K experts, which rounding once more would change, without gates.

    It has a profile, which no stage trains.
    """
    path = tmp_path_factory.mktemp("parent") / "tiny_pack.gguf"
    manifest = {"base_id": "tiny", "base_compatibility": ("==1.0.0",), "evaluation": {"old": 1.0}}
    write_tiny_pack(path, n_embd=N_EMBD, sites=(1, 2), expert_type="q4_k", manifest=manifest)
    weights = read_pack(path)
    profile = np.random.default_rng(0).standard_normal((3, N_EMBD), dtype=np.float32)
    bytes_now = unchanged_tensors(path, weights)
    weights = replace(weights, tensors={**weights.tensors, PROFILE: profile})
    write_pack(path, weights, bytes_now)
    return path


def begin(
    stage: Stage, parent: Path, base: Path, folder: Path, texts: Path, **changes: Any
) -> TrainOptions:
    """A very short run of a stage."""
    text = {"data": (texts / "domain.txt",), "neutral": (texts / "neutral.txt",)}
    with open_parent(str(parent)) as opened:
        return begin_stage(stage, opened, base, folder, **{**text, **SHORT, **changes})


def stored(path: Path) -> dict[str, NDArray[np.uint8]]:
    """The bytes of a pack file's tensors."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: np.frombuffer(t.data.tobytes(), np.uint8) for t in tensors}


@pytest.mark.parametrize("stage", [ALIGN, GATE], ids=["align", "gate"])
def test_what_is_frozen_keeps_its_bytes(
    stage: Stage, bases: list[Path], parent: Path, texts: Path, tmp_path: Path
) -> None:
    base = bases[1] if stage is ALIGN else bases[0]
    options = begin(stage, parent, base, tmp_path / "next", texts, learning_rate=1e-2)
    report = fit(options)
    assert report.best_step > 0, "else nothing would have been trained"
    save_result(options, report)
    built = build(options.project).gguf
    assert built is not None
    before, after = stored(parent), stored(built)
    trained = {"in", "norm"} if stage is ALIGN else {"token_gate"}
    assert PROFILE in after
    for name, found in after.items():
        same = name in before and np.array_equal(found, before[name])
        assert same == (name.split(".")[-2] not in trained), name
    assert before.keys() - after.keys() == set()
    # And the twin has computed with the numbers that those bytes stand for.
    exact = read_pack(parent).tensors
    for name, array in report.pack.to_arrays().items():
        if name.split(".")[2] not in trained:
            assert np.array_equal(array, exact[name]), name


def test_the_next_version_says_where_it_comes_from(
    bases: list[Path], parent: Path, texts: Path, tmp_path: Path
) -> None:
    options = begin(ALIGN, parent, bases[1], tmp_path / "next", texts, learning_rate=1e-2)
    report = fit(options)
    save_result(options, report, command="modularbase train align")
    manifest = read_manifest(options.project)
    digest = "sha256:" + sha256_of(parent, lambda _: None)
    assert manifest.training.derived_from == Origin(id="tiny_pack", version="1.0.0", digest=digest)
    assert (manifest.id, manifest.version) == ("tiny_pack", "1.1.0")
    assert (manifest.base_id, manifest.base_compatibility) == ("tiny", ("==1.1.0",))
    assert manifest.quantisation.experts == "q4_k"
    found = manifest.evaluation
    assert "old" not in found, "a figure of the parent on its own base"
    assert found["heldout perplexity of the parent"] == report.start["perplexity"]
    assert found["heldout perplexity of the base"] == report.base["perplexity"]
    assert found["heldout perplexity"] == report.figures["perplexity"]
    assert len({report.start["perplexity"], report.base["perplexity"]}) == 2
    assert read_config(options.project).geometry.sites == (1, 2)


def test_an_aligned_pack_gets_back_what_the_new_base_took(
    bases: list[Path], texts: Path, tmp_path: Path, tiny_model: TinyModelFactory
) -> None:
    options = toy_options(texts, tiny_model(), base=bases[0], **LONGER)
    taught = fit(options)
    old = tmp_path / "old.gguf"
    manifest = read_manifest(texts).model_copy(update={"base_id": "tiny"})
    export_pack(old, taught.pack, manifest, experts="q4_0")
    longer = {"steps": 30, "batch_blocks": 8, "heldout_blocks": 6, "eval_every": 10}
    report = fit(begin(ALIGN, old, bases[1], tmp_path / "new", texts, learning_rate=4e-3, **longer))
    unaligned, aligned = (np.log(f["perplexity"]) for f in (report.start, report.figures))
    before = np.log(taught.figures["perplexity"])
    assert unaligned > before + 0.3, "else there is nothing to get back"
    assert (unaligned - aligned) / (unaligned - before) > 0.5
    assert report.best_step > 0


def test_gates_shut_on_neutral_text(bases: list[Path], texts: Path, tmp_path: Path) -> None:
    strong = tmp_path / "strong.gguf"
    write_tiny_pack(strong, n_embd=N_EMBD, sites=(1, 2), strength=1.0, manifest={"base_id": "tiny"})
    options = begin(GATE, strong, bases[0], tmp_path / "next", texts, steps=12, learning_rate=0.1)
    assert read_config(options.project).geometry.token_gates
    report = fit(options)
    assert report.figures["neutral_kl"] < 0.8 * report.start["neutral_kl"]
    save_result(options, report)
    built = build(options.project).gguf
    assert built is not None and inspect_pack(built).has_token_gates
    assert not inspect_pack(strong).has_token_gates


def test_a_stage_is_resumed_like_any_run_also_elsewhere(
    bases: list[Path], parent: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = begin(ALIGN, parent, bases[1], Path("next"), texts)
    whole = fit(options)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move("next", moved.parent / "moved")
    monkeypatch.chdir("/")
    (moved / "runs" / "fit-001" / "checkpoint.pt").unlink()
    again = resume(moved)
    assert (again.start, again.figures) == (whole.start, whole.figures)
    told = json.loads((moved / "runs" / "fit-001" / "options.json").read_text())
    assert Path(told["parent"]).is_absolute()


def test_parents_are_found(parent: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="pack build"), open_parent(str(texts)):
        pass
    (texts / "dist").mkdir()
    shutil.copyfile(parent, texts / "dist" / "pack.gguf")
    with open_parent(str(texts)) as opened:
        assert opened.facts().manifest.id == "tiny_pack"
        assert opened.data == texts / "data"
        assert opened.texts["prompts.txt"] and opened.texts["README.md"]
    with pytest.raises(InstallError, match="no such file"), open_parent("nowhere.gguf"):
        pass


def test_what_does_not_go_together(
    bases: list[Path], parent: Path, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "next"
    with pytest.raises(PackIncompatibleError, match=r"1\.1\.0"):
        begin(GATE, parent, bases[1], folder, texts)
    with pytest.raises(InvalidRequestError, match="nowhere"):
        begin(ALIGN, parent, bases[1], folder, texts, data=(tmp_path / "nowhere",))
    with pytest.raises(InvalidRequestError, match="version"):
        begin(ALIGN, parent, bases[1], folder, texts, version="1.0.0")
    with pytest.raises(InvalidRequestError, match="text of the pack"):
        begin_stage(ALIGN, ParentPack(parent, {}, None), bases[1], folder)
    for field, shape in (("n_embd", {"n_embd": 64}), ("layers", {"sites": (1, 5)})):
        other = tmp_path / f"{field}.gguf"
        given: dict[str, Any] = {"n_embd": N_EMBD, "sites": (1, 2), **shape}
        write_tiny_pack(other, manifest={"base_id": "tiny"}, **given)
        with pytest.raises(PackIncompatibleError, match=field):
            begin(ALIGN, other, bases[1], folder, texts)
    assert not folder.exists()
    options = begin(ALIGN, parent, bases[1], folder, texts)
    assert begin(ALIGN, parent, bases[1], folder, texts) == options  # as after a failed run
    with pytest.raises(InvalidRequestError, match="folder"):
        begin(ALIGN, parent, bases[1], folder, texts, version="2.0.0")
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace("d_ff = 256", "d_ff = 512"))
    with pytest.raises(PackFormatError, match="geometry"):
        fit(options)
    assert (folder / PARENT_FILE).read_bytes() == parent.read_bytes()
    assert read_metadata(bases[1])["general.version"] == "1.1.0"
