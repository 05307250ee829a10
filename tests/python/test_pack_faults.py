"""Packs that are broken, damaged, for another base, or not what they say: refused, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine
from modularbase.errors import (
    InstallError,
    ModularBaseError,
    PackFormatError,
    PackIncompatibleError,
)
from modularbase.packs.pack_file import read_pack, write_pack
from modularbase.packs.weights import Probe
from tests.tools.engine_packs import (
    PROMPT,
    answer,
    install_pack,
    leased,
    never,
    pack_file,
    spoil,
    tokens,
)
from tests.tools.gguf_edit import Array, copy_gguf
from tests.tools.tiny_models import N_EMBD, N_LAYER, N_VOCAB
from tests.tools.tiny_requests import ids

MANIFEST_KEY = "modularbase-pack.manifest"
MakeFile = Callable[[Path], Path]


def nothing_there(folder: Path) -> Path:
    return folder / "nothing.gguf"


def a_folder(folder: Path) -> Path:
    (folder / "folder.gguf").mkdir()
    return folder / "folder.gguf"


def garbage(folder: Path) -> Path:
    path = folder / "garbage.gguf"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def empty(folder: Path) -> Path:
    (folder / "empty.gguf").touch()
    return folder / "empty.gguf"


def truncated(folder: Path) -> Path:
    path = pack_file(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def without_a_manifest(folder: Path) -> Path:
    return copy_gguf(pack_file(folder), folder / "copy.gguf", drop=(MANIFEST_KEY,))


def with_a_manifest_that_is_none(folder: Path) -> Path:
    changes = {MANIFEST_KEY: '{"id": "code"}'}
    return copy_gguf(pack_file(folder), folder / "copy.gguf", changes=changes)


def with_a_tensor_missing(folder: Path) -> Path:
    return copy_gguf(pack_file(folder), folder / "copy.gguf", drop=("site.1.router.weight",))


def with_nan(folder: Path) -> Path:
    def edit(name: str, data: Array, kind: Any) -> tuple[Array, Any]:
        if name == "site.1.in.weight":
            data[3, 4] = np.nan
        return data, kind

    return copy_gguf(pack_file(folder), folder / "copy.gguf", edit=edit)


def with_no_effect(folder: Path) -> Path:
    return pack_file(folder, strength=0.0)


def with_weight_nowhere(folder: Path) -> Path:
    return pack_file(folder, scale=0.0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (nothing_there, "file"),
        (a_folder, "file"),
        (garbage, "magic"),
        (empty, "file size"),
        (truncated, "tensor site.1.out.weight offset"),
        (without_a_manifest, MANIFEST_KEY),
        (with_a_manifest_that_is_none, "version"),
        (with_a_tensor_missing, "site.1.router.weight"),
        (with_nan, "site.1.in.weight"),
        (with_no_effect, "probe"),
        (with_weight_nowhere, "probe"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_files_that_are_no_packs(
    make: MakeFile, field: str, pack_engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    path = make(tmp_path / "made")
    for call in (pack_engine.packs.load, lambda file: pack_engine.packs.swap("code", file)):
        with pytest.raises(PackFormatError) as caught:
            call(str(path))
        assert (caught.value.file, caught.value.field) == (str(path), field)
    assert pack_engine.packs.list() == []
    assert pack_engine.packs.stats().used_bytes == 0
    pack_engine.packs.load(str(pack_file(tmp_path)))
    assert tokens(pack_engine, "code") != tokens(pack_engine)


def test_a_base_is_no_pack(pack_engine: Engine, pack_model: Path) -> None:
    with pytest.raises(PackFormatError, match=r"modularbase-pack\.manifest"):
        pack_engine.packs.load(str(pack_model))


@pytest.mark.parametrize(
    ("options", "field", "required"),
    [
        ({"base_id": "other-base"}, "base_id", "other-base"),
        ({"manifest": {"base_compatibility": (">=2", "<1")}}, "base_compatibility", ">=2 or <1"),
        ({"manifest": {"base_digest": "sha256:" + "0" * 64}}, "base_digest", "sha256:" + "0" * 64),
        ({"n_embd": N_EMBD + 32}, "n_embd", str(N_EMBD)),
        ({"sites": (1, N_LAYER)}, "sites", f"layers below {N_LAYER}"),
    ],
    ids=["base_id", "base_version", "base_digest", "n_embd", "layer"],
)
def test_packs_for_another_base(
    options: dict[str, Any], field: str, required: str, pack_engine: Engine, tmp_path: Path
) -> None:
    installed = install_pack(tmp_path, **options)
    for call in (
        lambda: pack_engine.packs.load(str(installed.path)),
        lambda: pack_engine.packs.load("code"),
        lambda: pack_engine.submit(ids(5), packs=never("code")),
    ):
        with pytest.raises(PackIncompatibleError) as caught:
            call()
        assert (caught.value.field, caught.value.required) == (field, required)
        assert "code" in caught.value.pack_id
    result = answer(pack_engine, "code")
    assert field in result.fallbacks[0].reason
    assert result.token_ids == tokens(pack_engine)
    assert pack_engine.packs.list() == []


def test_the_digest_of_the_right_base(pack_engine: Engine, tmp_path: Path) -> None:
    digest = pack_engine.base.digest
    install_pack(tmp_path, manifest={"base_digest": digest, "base_compatibility": ("==1.*",)})
    assert answer(pack_engine, "code").packs


@pytest.mark.parametrize("damage", ["content", "size", "record"])
def test_an_installed_pack_that_is_damaged(
    damage: str, pack_engine: Engine, tmp_path: Path
) -> None:
    pack = install_pack(tmp_path)
    if damage == "content":
        spoil(pack)
    elif damage == "size":
        pack.path.write_bytes(pack.path.read_bytes()[:-1000])
    else:
        record = pack.folder / "record.json"
        record.write_text(record.read_text().replace(pack.record.sha256, "0" * 64))
    error: type[ModularBaseError] = InstallError if damage == "size" else PackFormatError
    with pytest.raises(error, match=str(pack.folder)):
        pack_engine.packs.load("code")
    with pytest.raises(error):
        pack_engine.submit(ids(5), packs=never("code"))
    # It is installed, so this is a failure and not an unknown name.
    result = answer(pack_engine, "code")
    assert str(pack.folder) in result.fallbacks[0].reason
    assert pack_engine.packs.list() == []


def with_probe(source: Path, probe: Probe) -> Path:
    write_pack(source, replace(read_pack(source), probe=probe))
    return source


def test_a_stored_probe(pack_engine: Engine, tmp_path: Path) -> None:
    path = pack_file(tmp_path)
    pack_engine.packs.load(str(path))
    known = pack_engine.packs.known("code")
    assert known is not None
    effect = pack_engine.packs.measure_effect(known, PROMPT)
    assert (effect > 0.01).all()
    # Off by a fifth is within what other types of the base make; by three fifths is another pack.
    for factor, is_right in ((1.0, True), (1.2, True), (1.6, False), (0.0, False)):
        probe = Probe(PROMPT, tuple(float(e) * factor for e in effect))
        found = with_probe(path, probe)
        if is_right:
            assert pack_engine.packs.load(str(found)).digest != known.digest
            continue
        with pytest.raises(PackFormatError, match="the effect it was stored with") as caught:
            pack_engine.packs.load(str(found))
        assert caught.value.field == "probe"
    assert len(pack_engine.packs.list()) == 1


def test_a_probe_of_tokens_that_the_base_does_not_have(pack_engine: Engine, tmp_path: Path) -> None:
    path = with_probe(pack_file(tmp_path), Probe((1, N_VOCAB), (0.5, 0.5)))
    with pytest.raises(PackIncompatibleError) as caught:
        pack_engine.packs.load(str(path))
    assert (caught.value.field, caught.value.found) == ("probe", str(N_VOCAB))
    assert pack_engine.packs.list() == []


def test_a_file_that_is_deleted_while_its_pack_is_known(
    pack_engine: Engine, tmp_path: Path
) -> None:
    pack = install_pack(tmp_path)
    before = tokens(pack_engine, "code")
    with leased(pack_engine, "code"):
        shutil.rmtree(pack.folder)
        assert tokens(pack_engine, "code") == before
    pack_engine.packs.evict("code")
    assert tokens(pack_engine, "code") == before  # read again: the file is open
    assert pack_engine.packs.status("code").n_loads == 2


def test_a_file_that_is_deleted_before_its_first_use(pack_engine: Engine, tmp_path: Path) -> None:
    pack = install_pack(tmp_path)
    pack_engine.packs.preload("code")
    shutil.rmtree(pack.folder)
    assert answer(pack_engine, "code").fallbacks == ()


def test_a_file_that_is_changed_while_its_pack_is_resident(
    pack_engine: Engine, tmp_path: Path
) -> None:
    pack = install_pack(tmp_path)
    sound = pack.path.read_bytes()
    before = tokens(pack_engine, "code")
    spoil(pack)
    assert tokens(pack_engine, "code") == before
    pack_engine.packs.evict("code")
    with pytest.raises(PackFormatError, match="changed since"):
        answer(pack_engine, never("code"))
    assert pack_engine.packs.stats().used_bytes == 0
    pack.path.write_bytes(sound)
    pack_engine.packs.forget("code")
    assert tokens(pack_engine, "code") == before


@pytest.mark.parametrize("make", [truncated, with_nan, with_no_effect], ids=lambda f: f.__name__)
def test_a_swap_that_fails_changes_nothing(
    make: MakeFile, pack_engine: Engine, tmp_path: Path
) -> None:
    first = pack_engine.packs.load(str(pack_file(tmp_path)))
    before = tokens(pack_engine, "code")
    with leased(pack_engine, "code"), pytest.raises(PackFormatError):
        pack_engine.packs.swap("code", str(make(tmp_path / "made")))
    (status,) = pack_engine.packs.list()
    assert (status.id, status.digest, status.state) == ("code", first.digest, "resident")
    assert not status.is_retired
    assert tokens(pack_engine, "code") == before
    assert pack_engine.packs.stats().used_bytes == status.n_bytes
