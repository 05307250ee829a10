"""`modularbase train router` and `train fusion`: from text to an installed router pack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modularbase import Engine
from modularbase.errors import PackIncompatibleError
from modularbase.types import PackRequest, PackUse
from tests.conftest import TinyModelFactory
from tests.python.cli.conftest import Cli
from tests.python.packs.small_packs import small_gguf
from tests.python.training.toy import text
from tests.tools.tiny_models import N_EMBD, TinyModel
from tests.tools.tiny_packs import write_tiny_pack

WORDS = {
    "knee": ("fever", "of", "the", "left", "knee", "acute"),
    "code": ("def", "return", "import", "(x)", "lambda:", "[0]"),
    "neutral": ("RIVER", "MOON", "QUARTZ", "BOLD", "JUMPY", "WAX"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for i, (name, words) in enumerate(WORDS.items()):
        (tmp_path / f"{name}.txt").write_text(text(words, 800, seed=i))


def arguments(base: Path, *packs: str) -> tuple[object, ...]:
    named = [part for pack in packs for part in ("--pack", pack)]
    rest = ("--neutral", "neutral.txt", "--base", base, "--snippets", 30, "-t", 1)
    return ("train", "router", "switch", *named, *rest)


def test_from_text_to_an_installed_router(cli: Cli, tiny_model: TinyModelFactory) -> None:
    model = tiny_model()
    given = arguments(model.path, "knee@1.0.0=knee.txt", "code@0.2.0=code.txt")
    shown = cli(*given, "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["labels"] == ["knee", "code", "none"] and facts["accuracy"] > 0.8
    assert sum(map(sum, facts["confusion"])) == 3 * 5 and "reading" in shown.err
    assert "calibration_error" in cli(*given).out
    built = cli("pack", "build", "switch", "--json")
    assert built.code == 0 and json.loads(built.out)["archive"] == "switch/dist/switch-0.1.0.mbpack"
    assert cli("pack", "install", "./switch").code == 0
    (row,) = json.loads(cli("pack", "list", "--json").out)
    assert (row["type"], row["experts"]) == ("router", None)
    assert "router" in cli("pack", "list").out
    known = json.loads(cli("pack", "info", "switch", "--json").out)
    assert [pack["id"] for pack in known["packs"]] == ["knee", "code"]
    assert (known["layer"], known["pooling"], known["heads"]) == (1, "mean", ["router"])
    assert known["base_digest"].startswith("sha256:") and "quantisation" not in known
    assert known["evaluation"]["router accuracy"] == facts["accuracy"]
    assert known["training"]["data"][0] == "knee: knee.txt"
    assert cli("pack", "verify").code == 0
    with Engine.load(model.path) as engine:
        for pack in ("switch", "./switch/dist/pack.gguf"):
            with pytest.raises(PackIncompatibleError, match="type: required domain"):
                engine.packs.load(pack)
        with pytest.raises(PackIncompatibleError, match="type: required domain"):
            engine.generate("hi", packs=PackRequest(packs=(PackUse("switch"),), fallback="never"))


def write_packs(folder: Path, model: TinyModel) -> None:
    for seed, name in enumerate(("knee", "code", "third")):
        manifest = {"id": name, "base_id": model.path.stem}
        path = folder / f"{name}.gguf"
        write_tiny_pack(path, n_embd=N_EMBD, sites=(1,), seed=seed, manifest=manifest)


def test_fusion_joins_a_router(cli: Cli, tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    model = tiny_model()
    write_packs(tmp_path, model)
    packs = ("./knee.gguf=knee.txt", "./code.gguf=code.txt")
    given = list(arguments(model.path, *packs))
    assert cli(*given, "--layer", 2).code == 0
    fused = ["train", "fusion", *given[2:7], "--base", model.path, "-t", 1, "--block-tokens", 32]
    shown = cli(*fused, "--steps", 2, "--batch-blocks", 2, "--heldout-blocks", 4, "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert facts["layer"] == 2 and facts["n_tokens"] == 2 * 2 * 32  # the router's layer
    assert set(facts["perplexity"]["knee"]) == {"base", "equal", "own", "fused"}
    assert [sum(row) for row in facts["shares"]] == pytest.approx([1, 1])
    assert "loss" in shown.err
    assert cli("pack", "build", "switch").code == 0
    known = json.loads(cli("pack", "info", "./switch/dist/pack.gguf", "--json").out)
    assert known["heads"] == ["router", "fusion"] and known["layer"] == 2
    assert known["training"]["command"].startswith("modularbase train fusion switch")
    assert {"router accuracy", "fusion perplexity of knee own"} <= set(known["evaluation"])
    for code, change, told in (
        (2, ["--layer", 1], "layer"),
        (2, ["--pooling", "last"], "pooling"),
        (2, ["--pack", "./third.gguf=code.txt"], "packs"),
    ):
        wrong = cli(*fused, *change)
        assert wrong.code == code and told in wrong.err


def test_what_goes_wrong_is_said(cli: Cli, tiny_model: TinyModelFactory, tmp_path: Path) -> None:
    model = tiny_model()
    for code, packs, told in (
        (2, ["knee.txt"], "PACK=TEXT"),
        (1, ["knee=knee.txt"], "no pack knee"),
        (2, ["knee@1.0.0=nowhere.txt"], "nowhere.txt"),
        (1, ["./knee.txt=knee.txt"], "knee.txt"),
    ):
        shown = cli(*arguments(model.path, *packs))
        assert (shown.code, shown.out) == (code, ""), shown.err
        assert told in shown.err and "Traceback" not in shown.err
    small_gguf(tmp_path / "code.gguf", "code@3.0.0")
    shown = cli(*arguments(model.path, "./code.gguf=code.txt"), "--json")
    assert shown.code == 0 and json.loads(shown.out)["labels"] == ["code", "none"]
    assert cli("pack", "init", "--domain", "medical", "--base", model.path).code == 0
    given = list(arguments(model.path, "./code.gguf=code.txt"))
    given[2] = "medical"
    shown = cli(*given)
    assert shown.code == 2 and "type: expected router" in shown.err
