"""Pack files written from arrays: read back by ourselves and by the `gguf` package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from modularbase import _core
from modularbase.errors import InstallError, InvalidRequestError, PackFormatError
from modularbase.packs.inspection import is_pack
from modularbase.packs.manifest import Quantisation, parse_manifest
from modularbase.packs.pack_file import inspect_pack, read_pack, write_pack
from modularbase.packs.weights import PROFILE, PackWeights, Probe
from modularbase.types import FloatArray
from tests.python.packs.small_packs import GEOMETRY, small_gguf, small_tensors, small_weights
from tests.tools.gguf_edit import copy_gguf


def full_weights(**changes: Any) -> PackWeights:
    """With token gates, a profile and a probe."""
    random = np.random.default_rng(1)
    tensors = small_tensors() | {
        "site.0.token_gate.weight": random.standard_normal(32, dtype=np.float32),
        "site.0.token_gate.bias": np.array([0.5], np.float32),
        PROFILE: random.standard_normal((3, 32), dtype=np.float32),
    }
    weights = small_weights(**changes)
    return replace(weights, tensors=tensors, probe=Probe((1, 9), (0.5, 0.25)), scale=0.5)


def relative_error(wanted: FloatArray, found: FloatArray) -> float:
    return float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted))


# Roundings of normal numbers: half a unit in the last place; for blocks, measured at about half.
@pytest.mark.parametrize(
    ("experts", "bound"), [("f16", 2.0**-11), ("q8_0", 0.01), ("q4_0", 0.11), ("q4_k", 0.09)]
)
def test_round_trip(experts: str, bound: float, tmp_path: Path) -> None:
    said = Quantisation.model_validate({"experts": experts, "adapters": "bf16"})
    weights = full_weights(quantisation=said)
    facts = write_pack(tmp_path / "a.gguf", weights)
    assert (facts.expert_type, facts.adapter_type) == (experts, "bf16")
    assert (facts.has_token_gates, facts.n_centroids) == (True, 3)
    again = read_pack(tmp_path / "a.gguf")
    assert again.geometry == replace(GEOMETRY, norm_eps=float(np.float32(1e-5)))
    assert (again.scale, again.probe) == (0.5, weights.probe)
    assert again.manifest == weights.manifest.model_copy(update={"size_bytes": facts.n_bytes})
    assert again.tensors.keys() == weights.tensors.keys()
    for name, wanted in weights.tensors.items():
        found = again.tensors[name]
        assert found.shape == wanted.shape
        if ".expert_" in name:
            assert relative_error(wanted, found) < bound, name
        elif name.endswith(("in.weight", "out.weight")):
            assert relative_error(wanted, found) < 2.0**-8, name
        else:
            assert np.array_equal(wanted, found), name


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    weights = full_weights(name="医疗问答包@1.0.0")
    write_pack(tmp_path / "a.gguf", weights)
    reader = GGUFReader(tmp_path / "a.gguf")

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    assert value("general.architecture") == "modularbase-pack"
    assert value("modularbase-pack.sites") == [3]
    assert value("modularbase-pack.probe.tokens") == [1, 9]
    assert json.loads(value("modularbase-pack.manifest"))["id"] == "医疗问答包"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == weights.tensors.keys()
    assert list(tensors["site.0.expert_down.weight"].shape) == [256, 256, 2]
    assert tensors["site.0.expert_down.weight"].tensor_type.name == "Q8_0"
    router = tensors["site.0.router.weight"].data
    assert np.array_equal(router, weights.tensors["site.0.router.weight"])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"site.0.in.weight": None}, "site.0.in.weight"),
        ({"site.0.in.weight": np.zeros((256, 33), np.float32)}, "site.0.in.weight shape"),
        ({"site.1.in.weight": np.zeros((256, 32), np.float32)}, "site.1.in.weight"),
        ({"site.0.norm.weight": np.full(256, np.nan, np.float32)}, "site.0.norm.weight"),
        ({"site.0.out.weight": np.full((32, 256), 1e9, np.float32)}, "site.0.out.weight"),
        ({"site.0.token_gate.bias": np.zeros(1, np.float32)}, "site.0.token_gate.weight"),
        ({PROFILE: np.zeros((65, 32), np.float32)}, f"{PROFILE} shape"),
        ({PROFILE: np.zeros((0, 32), np.float32)}, f"{PROFILE} shape"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(
    change: dict[str, FloatArray | None], field: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = {**small_tensors(), **change}
    kept = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(PackFormatError) as caught:
        write_pack(tmp_path / "a.gguf", replace(small_weights(), tensors=kept))
    assert caught.value.field == field
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("probe", "field"),
    [
        (Probe((), (0.5,)), "modularbase-pack.probe.tokens"),
        (Probe((1, 2), (0.5,)), "modularbase-pack.probe.effect"),
        (Probe((1,), (float("nan"),)), "modularbase-pack.probe.effect"),
        (Probe((-1,), (0.5,)), "modularbase-pack.probe.tokens"),
        (Probe((1,) * 65, (0.5,) * 65), "modularbase-pack.probe.tokens"),
    ],
)
def test_a_probe_that_makes_no_sense(probe: Probe, field: str, tmp_path: Path) -> None:
    with pytest.raises(PackFormatError) as caught:
        write_pack(tmp_path / "a.gguf", replace(small_weights(), probe=probe))
    assert caught.value.field == field
    assert not list(tmp_path.iterdir()), "neither the file nor a part of it"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quantisation": {"experts": "q4_0"}}, "manifest quantisation.experts"),
        (
            {"quantisation": {"experts": "q8_0", "adapters": "bf16"}},
            "manifest quantisation.adapters",
        ),
        ({"size_bytes": 5}, "manifest size_bytes"),
        ({"id": "../up"}, "id"),
    ],
    ids=str,
)
def test_a_manifest_that_says_otherwise(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "a.gguf")
    raw = json.loads(inspect_pack(path).manifest.to_json()) | change
    changes = {"modularbase-pack.manifest": json.dumps(raw)}
    with pytest.raises(PackFormatError) as caught:
        inspect_pack(copy_gguf(path, tmp_path / "b.gguf", changes=changes))
    assert caught.value.field == field


def test_writing_replaces_a_file_at_once(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "a.gguf")
    before = path.read_bytes()
    with pytest.raises(PackFormatError):
        write_pack(path, replace(small_weights(), tensors={}))
    assert path.read_bytes() == before
    with pytest.raises(InstallError, match="choose another place") as caught:
        write_pack(tmp_path / "no" / "a.gguf", small_weights())
    assert caught.value.kind == "unwritable"


def test_paths_with_any_letters(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "医疗 问答.gguf", "医疗问答包@1.0.0")
    assert is_pack(path) and inspect_pack(path).manifest.id == "医疗问答包"
    with pytest.raises(PackFormatError, match="UTF-8"):
        inspect_pack(tmp_path / "\udcff.gguf")


def test_rounding_from_python() -> None:
    rows = np.random.default_rng(2).standard_normal((3, 256), dtype=np.float32)
    data = _core.quantize(rows, "q4_k")
    assert data.shape == (3, 144) and data.dtype == np.uint8
    assert _core.dequantize(data, "q4_k").shape == (3, 256)
    assert np.array_equal(_core.dequantize(_core.quantize(rows, "f32"), "f32"), rows)
    for bad, kind in ((rows, "q9"), (rows[:, :128], "q4_k"), (rows * np.nan, "f16")):
        with pytest.raises(InvalidRequestError):
            _core.quantize(bad, kind)
    with pytest.raises(ValueError, match="two dimensions"):
        _core.quantize(rows[0], "f16")


def test_manifests_survive(tmp_path: Path) -> None:
    weights = small_weights(description='a\nb \u2028 "c"', evaluation={"ppl": 3.25})
    path = tmp_path / "a.gguf"
    write_pack(path, weights)
    found = inspect_pack(path).manifest
    assert found.description == weights.manifest.description
    assert parse_manifest(found.to_json(), "again") == found
