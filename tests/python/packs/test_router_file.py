"""Router packs as files: read back by ourselves and by the `gguf` package, and spoilt ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modularbase import _core
from modularbase.errors import PackFormatError
from modularbase.packs import archive
from modularbase.packs.inspection import check_pack, is_pack, is_router
from modularbase.packs.pack_file import inspect_pack
from modularbase.packs.router_file import LinearHead, RouterWeights, read_router, write_router
from tests.python.packs.small_packs import small_gguf, small_manifest
from tests.python.packs.small_routers import N_EMBD, PACKS, small_router
from tests.tools.gguf_edit import copy_gguf

KEY = "modularbase-router."


def same(found: RouterWeights, wanted: RouterWeights) -> bool:
    """Equal to the bit, sizes in the manifest apart."""
    heads = zip(found.heads.items(), wanted.heads.items(), strict=True)
    return (
        all(
            (name, head.temperature) == (other_name, np.float32(other.temperature))
            and np.array_equal(head.weight, other.weight)
            and np.array_equal(head.bias, other.bias)
            for (name, head), (other_name, other) in heads
        )
        and (found.layer, found.pooling, found.packs)
        == (wanted.layer, wanted.pooling, wanted.packs)
        and found.manifest == wanted.manifest.model_copy(update={"size_bytes": n_bytes(wanted)})
    )


def n_bytes(weights: RouterWeights) -> int:
    return sum(head.weight.nbytes + head.bias.nbytes for head in weights.heads.values())


@pytest.mark.parametrize("heads", [("router",), ("fusion",), ("router", "fusion")])
def test_round_trip(heads: Any, tmp_path: Path) -> None:
    weights = small_router(heads=heads)
    written = write_router(tmp_path / "a.gguf", weights)
    assert same(written, weights) and same(read_router(tmp_path / "a.gguf"), weights)
    assert is_pack(tmp_path / "a.gguf") and is_router(tmp_path / "a.gguf")
    assert check_pack(tmp_path / "a.gguf") == written.manifest


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    weights = small_router()
    write_router(tmp_path / "a.gguf", weights)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "modularbase-router"
    assert reader.fields[f"{KEY}packs.id"].contents() == [pack.id for pack in PACKS]
    assert reader.fields[f"{KEY}router.temperature"].contents() == 1.5
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors["router.weight"].shape) == [N_EMBD, 3]
    assert np.array_equal(tensors["fusion.bias"].data, weights.heads["fusion"].bias)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"general.architecture": "llama"}, "general.architecture"),
        ({f"{KEY}format_version": 2}, f"{KEY}format_version"),
        ({f"{KEY}n_embd": N_EMBD + 1}, "router.weight"),
        ({f"{KEY}layer": 1 << 17}, f"{KEY}layer"),
        ({f"{KEY}pooling": "max"}, f"{KEY}pooling"),
        ({f"{KEY}packs.id": ["a", "a"]}, f"{KEY}packs"),
        ({f"{KEY}packs.id": ["a"]}, f"{KEY}packs"),
        ({f"{KEY}packs.id": ["a", "../up"]}, f"{KEY}packs.id"),
        ({f"{KEY}packs.version": ["1.0.0", "new"]}, f"{KEY}packs.version"),
        ({f"{KEY}router.temperature": 0.0}, f"{KEY}router.temperature"),
        ({f"{KEY}fusion.temperature": float("nan")}, f"{KEY}fusion.temperature"),
        ({f"{KEY}manifest": "{}"}, "id"),
        (
            {f"{KEY}manifest": small_manifest("a@1.0.0").to_json()},
            "manifest type",
        ),
        (
            {f"{KEY}manifest": small_manifest("a@1.0.0", type="router", size_bytes=5).to_json()},
            "manifest size_bytes",
        ),
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    write_router(tmp_path / "a.gguf", small_router())
    spoilt = copy_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", changes=changes)
    with pytest.raises(PackFormatError) as caught:
        read_router(spoilt)
    assert caught.value.field == field and caught.value.file == str(spoilt)


def ones(n_rows: int, n_outputs: int, value: float = 1.0) -> LinearHead:
    return LinearHead(np.full((n_rows, N_EMBD), value, np.float32), np.ones(n_outputs, np.float32))


@pytest.mark.parametrize(
    ("heads", "field"),
    [
        ({"router": ones(2, 2)}, "router.weight"),
        ({"router": ones(3, 2)}, "router.bias"),
        ({"fusion": ones(2, 2, float("nan"))}, "fusion.weight"),
        ({"other": ones(3, 3)}, "tensors"),
    ],
)
def test_heads_that_do_not_fit_leave_no_file(
    heads: dict[Any, LinearHead], field: str, tmp_path: Path
) -> None:
    with pytest.raises(PackFormatError) as caught:
        write_router(tmp_path / "a.gguf", replace(small_router(), heads=heads))
    assert caught.value.field == field
    assert not list(tmp_path.iterdir())


def test_tensors_of_other_types_are_refused(tmp_path: Path) -> None:
    write_router(tmp_path / "a.gguf", small_router())
    narrow = gguf.GGMLQuantizationType.F16
    spoilt = copy_gguf(
        tmp_path / "a.gguf",
        tmp_path / "b.gguf",
        edit=lambda _, values, __: (values.astype(np.float16), narrow),
    )
    with pytest.raises(PackFormatError, match="rows of f32"):
        read_router(spoilt)
    with pytest.raises(PackFormatError, match=r"fusion\.bias"):
        read_router(copy_gguf(tmp_path / "a.gguf", tmp_path / "c.gguf", drop=("fusion.bias",)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("router") / "a.gguf"
    write_router(path, small_router())
    return path.read_bytes()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_spoilt_bytes(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    raw = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        if place < len(raw):
            raw[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(raw)
    try:
        found = read_router(path)
    except PackFormatError:
        return
    assert all(np.isfinite(head.weight).all() for head in found.heads.values())


def test_each_type_of_pack_is_refused_as_the_other(tmp_path: Path) -> None:
    write_router(tmp_path / "router.gguf", small_router())
    domain = small_gguf(tmp_path / "domain.gguf")
    with pytest.raises(PackFormatError, match="modularbase-pack"):
        inspect_pack(tmp_path / "router.gguf")
    with pytest.raises(PackFormatError, match="modularbase-router"):
        read_router(domain)
    raw = json.loads(inspect_pack(domain).manifest.to_json()) | {"type": "router"}
    changes = {"modularbase-pack.manifest": json.dumps(raw)}
    with pytest.raises(PackFormatError, match="manifest type: expected domain"):
        inspect_pack(copy_gguf(domain, tmp_path / "b.gguf", changes=changes))
    with pytest.raises(PackFormatError, match="modularbase-pack"):
        _core.read_pack(str(tmp_path / "router.gguf"))


def test_it_travels_as_an_archive(tmp_path: Path) -> None:
    written = write_router(tmp_path / "a.gguf", small_router())
    archive.write_archive(tmp_path / "a.mbpack", tmp_path / "a.gguf", "# A router\n")
    (tmp_path / "out").mkdir()
    found = archive.unpack(tmp_path / "a.mbpack", tmp_path / "out", lambda _: None)
    assert found == written.manifest
