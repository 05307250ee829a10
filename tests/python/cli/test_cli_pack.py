"""`modularbase pack`: from an empty folder to an installed pack, and what goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.python.packs.small_packs import GEOMETRY, small_archive, small_gguf, small_tensors
from tests.python.packs.web_server import serving

if TYPE_CHECKING:
    from tests.python.cli.conftest import Cli


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    folder = tmp_path / "shelf"
    small_archive(folder, "code@1.0.0", needs=["logic >=1"])
    small_archive(folder, "logic@1.0.0")
    return folder


def test_help(cli: Cli) -> None:
    shown = cli("pack", "--help")
    for command in (
        "init",
        "build",
        "quantize",
        "verify",
        "info",
        "list",
        "install",
        "remove",
        "lock",
        "tree",
        "index",
    ):
        assert re.search(rf"\b{command}\b", shown.out)
        assert cli("pack", command, "--help").code == 0


def test_from_nothing_to_an_installed_pack(cli: Cli, tmp_path: Path) -> None:
    made = cli("pack", "init", "--domain", "medical", "--name", "医疗问答包")
    assert (made.code, made.out) == (0, "")
    config = tmp_path / "medical" / "train.toml"
    text = re.sub(r"sites = .*", f"sites = {list(GEOMETRY.sites)}", config.read_text())
    text = text.replace("n_expert = 8", "n_expert = 2").replace("used = 2", "used = 1")
    config.write_text(text)
    np.savez(tmp_path / "medical" / "weights" / "w.npz", **small_tensors())  # type: ignore[arg-type]
    # The smallest pack suits no base that there is: it cannot be tried on one.
    built = cli("pack", "build", "medical", "--unmeasured", "--json")
    assert built.code == 0
    report = json.loads(built.out)
    assert report["archive"] == "medical/dist/medical-0.1.0.mbpack"
    assert report["errors"]["site.0.expert_up.weight"] < 0.11
    assert "expert_up" in cli("pack", "build", "medical", "--unmeasured").out
    assert cli("pack", "verify", "medical/dist/pack.gguf", report["archive"]).code == 0
    installed = cli("pack", "install", "./medical")
    assert (installed.code, installed.out) == (
        0,
        "",
    ) and "medical 0.1.0 is installed" in installed.err
    assert "医疗问答包" in cli("pack", "list").out
    facts = json.loads(cli("pack", "info", "medical", "--json").out)
    assert (facts["name"], facts["sites"], facts["n_embd"]) == ("医疗问答包", [3], 32)
    assert "n_bytes" in facts and "医疗问答包" in cli("pack", "info", "medical").out
    again = cli("pack", "init", "--domain", "medical")
    assert again.code == 2 and "README" not in again.out and "pack.json" in again.err


def test_install_from_an_index(cli: Cli, shelf: Path) -> None:
    assert "2 packs" in cli("pack", "index", shelf).err
    with serving(shelf) as web:
        shown = cli("pack", "install", "code@1.0.0", "--index", web.address, "--json")
    assert shown.code == 0
    packs = json.loads(shown.out)
    assert [pack["id"] for pack in packs] == ["logic", "code"]
    assert all(Path(pack["path"]).is_file() for pack in packs)
    assert cli("pack", "tree").out == "code 1.0.0\n└── logic 1.0.0 (needs >=1)\n"
    assert cli("pack", "tree", "logic").out == "logic 1.0.0\n"
    verdicts = json.loads(cli("pack", "verify", "--json").out)
    assert [verdict["faults"] for verdict in verdicts] == [[], []]


def test_the_index_from_the_environment(
    cli: Cli, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODULARBASE_PACK_INDEX", str(shelf))
    assert cli("pack", "install", "code", "--base", "smollm2-135m@1.0.0").code == 0
    refused = cli("pack", "install", "code", "--base", "other@1.0.0")
    assert refused.code == 1 and "DependencyError" in refused.err


def test_lock_and_install_from_it(
    cli: Cli, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("pack", "install", "code", "--index", shelf).code == 0
    assert cli("pack", "lock").code == 0
    lock = json.loads((tmp_path / "modularbase-packs.lock").read_text())
    assert [pack["id"] for pack in lock["packs"]] == ["logic", "code"]
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "another"))
    assert json.loads(cli("pack", "list", "--json").out) == []
    assert cli("pack", "install", "--lock", "modularbase-packs.lock").code == 0
    found = json.loads(cli("pack", "list", "--json").out)
    assert {p["sha256"] for p in found} == {p["sha256"] for p in lock["packs"]}


def test_remove(cli: Cli, shelf: Path) -> None:
    cli("pack", "install", "code", "--index", shelf)
    refused = cli("pack", "remove", "logic")
    assert refused.code == 1 and "code 1.0.0 needs logic" in refused.err
    assert cli("pack", "remove", "logic", "--force").code == 0
    shown = cli("pack", "verify")
    assert shown.code == 1 and "needs logic >=1, which is not installed" in shown.out
    assert cli("pack", "remove", "code").code == 0
    missing = cli("pack", "remove", "code")
    assert missing.code == 1 and "PackNotFoundError" in missing.err


def test_damage_is_shown(cli: Cli, shelf: Path, tmp_path: Path) -> None:
    cli("pack", "install", "logic", "--index", shelf)
    gguf = tmp_path / "home" / "packs" / "logic" / "1.0.0" / "pack.gguf"
    data = bytearray(gguf.read_bytes())
    data[-9] ^= 1
    gguf.write_bytes(data)
    shown = cli("pack", "verify", "logic", "--json")
    assert shown.code == 1 and "sha256" in json.loads(shown.out)[0]["faults"][0]
    gguf.unlink()
    assert cli("pack", "verify", "logic").code == 1
    (row,) = json.loads(cli("pack", "list", "--json").out)
    assert "damaged" in row["damage"] and "damaged" in cli("pack", "list").out


def test_quantize(cli: Cli, tmp_path: Path) -> None:
    small_gguf(tmp_path / "a.gguf")
    arguments = ("pack", "quantize", "a.gguf", "-o", "b.gguf", "--experts")
    shown = cli(*arguments, "q4_0", "--version", "1.0.1", "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["quantisation"]["experts"] == "q4_0"
    assert json.loads(cli("pack", "info", "b.gguf", "--json").out)["version"] == "1.0.1"
    assert cli(*arguments, "q9", "--version", "1.0.1").code == 2
    assert cli(*arguments, "q4_0", "--version", "1.0.0").code == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("install",), 2),
        (("install", "a", "--lock", "b"), 2),
        (("install", "code@"), 2),
        (("install", "code", "--base", "smollm2-135m"), 2),
        (("install", "code"), 1),
        (("install", "code", "--index", "nowhere"), 1),
        (("install", "./nowhere"), 1),
        (("install", "--lock", "nowhere"), 1),
        (("info", "nothing"), 1),
        (("info", "nothing.gguf"), 1),
        (("info", "nothing.mbpack"), 1),
        (("verify", "nothing"), 1),
        (("verify", "nothing.mbpack"), 1),
        (("tree", "nothing"), 1),
        (("lock", "nothing"), 1),
        (("lock", "-o", "no/such/file"), 1),
        (("index", "nowhere"), 1),
        (("build", "nowhere"), 1),
        (("init",), 2),
        (("init", "--domain", "/"), 2),
        (("init", "--domain", "x", "--base", "nobody"), 1),
        (("quantize", "no.gguf", "-o", "b.gguf", "--experts", "f16", "--version", "1.0.0"), 1),
    ],
    ids=str,
)
def test_what_goes_wrong_is_said(arguments: tuple[str, ...], code: int, cli: Cli) -> None:
    outcome = cli("pack", *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert "rror" in outcome.err and "Traceback" not in outcome.err
