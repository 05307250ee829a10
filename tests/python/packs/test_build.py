"""Project folders: made, built from trained weights, and packs rounded to another type."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from modularbase.errors import InstallError, InvalidRequestError, PackFormatError
from modularbase.packs.archive import unpack
from modularbase.packs.build import build, quantize
from modularbase.packs.install import install
from modularbase.packs.manifest import Origin
from modularbase.packs.pack_file import inspect_pack, read_pack
from modularbase.packs.project import read_config, read_manifest
from modularbase.packs.scaffold import default_sites, id_of, init_project
from modularbase.packs.weights_file import read_weights
from modularbase.storage.digest import sha256_of
from tests.python.packs.small_packs import GEOMETRY, small_archive, small_gguf, small_tensors


def nothing(_: int) -> None: ...


def safetensors(tensors: dict[str, tuple[str, NDArray[np.generic]]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"made_by": "a test"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def all_f32() -> bytes:
    return safetensors({name: ("F32", array) for name, array in small_tensors().items()})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of the geometry of the small packs, with weights."""
    folder = tmp_path / "project"
    init_project(folder, domain="medical", name="医疗问答包", base_id="smollm2-135m", n_layer=30)
    config = (folder / "train.toml").read_text(encoding="utf-8")
    config = config.replace(str(list(default_sites(30))), str(list(GEOMETRY.sites)))
    config = config.replace("n_expert = 8", "n_expert = 2").replace("used = 2", "used = 1")
    (folder / "train.toml").write_text(config, encoding="utf-8")
    (folder / "weights" / "final.safetensors").write_bytes(all_f32())
    return folder


def test_a_new_project(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    made = init_project(
        folder, domain="medical", name="医疗问答包", base_id="smollm2-135m", n_layer=30
    )
    assert (made.id, made.name, made.base_id) == ("medical", "医疗问答包", "smollm2-135m")
    assert read_manifest(folder) == made
    config = read_config(folder)
    assert config.base == "smollm2-135m" and len(config.geometry.sites) == 8
    assert config.geometry.sites[0] == 15 and config.geometry.sites[-1] < 30
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = (folder / "data" / name).read_text(encoding="utf-8").splitlines()
        assert rows and all(
            json.loads(row).keys() <= {"prompt", "response", "text"} for row in rows
        )
    assert "医疗问答包" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "prompts.txt").read_text().strip()
    assert (folder / "data" / "README.md").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text("mine")
    with pytest.raises(InvalidRequestError, match=r"train\.toml"):
        init_project(tmp_path, domain="x", name="x", base_id="b", n_layer=4)
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InstallError):
        init_project(tmp_path / "file" / "p", domain="x", name="x", base_id="b", n_layer=4)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("medical", "medical"),
        ("Family law", "family_law"),
        ("医疗", "医疗"),
        ("a/../b", "a_.._b"),
        ("C++", "c"),
        ("_x_", "x"),
    ],
)
def test_ids_from_domains(domain: str, expected: str) -> None:
    assert id_of(domain) == expected


@pytest.mark.parametrize("domain", ["", "/", "..", "\x00"])
def test_domains_without_an_id(domain: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        init_project(tmp_path / "p", domain=domain, name="x", base_id="b", n_layer=4)
    assert caught.value.field == "domain"


@given(st.integers(1, 200))
def test_sites_lie_in_the_upper_half(n_layer: int) -> None:
    sites = default_sites(n_layer)
    assert list(sites) == sorted(set(sites)) and 1 <= len(sites) <= 8
    assert sites[0] == n_layer // 2 and sites[-1] < n_layer


def test_build_and_install(project: Path, home: Path) -> None:
    report = build(project)
    assert report.gguf == project / "dist" / "pack.gguf"
    assert report.archive == project / "dist" / "medical-0.1.0.mbpack"
    matrices = {f"site.0.expert_{part}.weight" for part in ("gate", "up", "down")}
    assert report.errors.keys() == matrices | {"site.0.in.weight", "site.0.out.weight"}
    # Normal numbers in Q4_0 and F16: see the bounds of test_pack_file.
    assert all(0.05 < report.errors[name] < 0.11 for name in matrices)
    assert 0 < report.errors["site.0.in.weight"] < 2.0**-11
    weights = read_pack(report.gguf)
    wanted = small_tensors()["site.0.router.weight"]
    assert np.array_equal(weights.tensors["site.0.router.weight"], wanted)
    assert weights.manifest == report.manifest and report.manifest.size_bytes > 0
    (installed,) = install([f"{project}/"])
    assert installed.manifest == report.manifest
    assert "医疗问答包" in (installed.folder / "README.md").read_text(encoding="utf-8")


def test_a_project_that_is_not_built(project: Path, home: Path) -> None:
    with pytest.raises(InstallError, match="pack build") as caught:
        install([f"{project}/"])
    assert caught.value.kind == "not_found"
    with pytest.raises(PackFormatError, match=r"pack\.json"):
        install([f"{project.parent}/"])


def test_what_a_build_refuses(project: Path) -> None:
    weights = project / "weights" / "final.safetensors"

    def field() -> str:
        with pytest.raises(PackFormatError) as caught:
            build(project)
        return caught.value.field

    config = project / "train.toml"
    text = config.read_text(encoding="utf-8")
    for old, new, expected in (
        ("d_ff = 256", "d_ff = 255", "geometry.d_ff"),
        ("d_ff = 256", "d_ff = 512", "site.0.expert_down.weight shape"),
        ("sites = [3]", "sites = [3, 2]", "geometry.sites"),
        ("sites = [3]", "sites = [3, 4]", "site.1.expert_down.weight"),
        ("[geometry]", "[geometry", "file"),
        ('base = "smollm2-135m"', 'base = "other"', "train.toml base"),
        ("seed = 0", "sed = 0", "optimisation.sed"),
    ):
        assert old in text
        config.write_text(text.replace(old, new), encoding="utf-8")
        assert field() == expected
    config.write_text(text, encoding="utf-8")
    (project / "weights" / "second.npz").write_bytes(b"")
    assert field() == "weights"
    weights.unlink()
    assert field() == "file", "an empty .npz"
    (project / "weights" / "second.npz").unlink()
    assert field() == "weights"
    assert not (project / "dist").exists() or not list((project / "dist").iterdir())


def test_weights_of_all_types(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [0.25, 96.0]], np.float32)  # exact in all of them
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        safetensors(
            {"a": ("F32", values), "b": ("F16", values.astype(np.float16)), "c": ("BF16", upper)}
        )
    )
    for array in read_weights(path).values():
        assert array.dtype == np.float32 and np.array_equal(array, values)
    np.savez(tmp_path / "w.npz", a=values, b=values.astype(np.float16))
    for array in read_weights(tmp_path / "w.npz").values():
        assert array.dtype == np.float32 and np.array_equal(array, values)
    np.savez(tmp_path / "d.npz", a=values.astype(np.float64))
    with pytest.raises(PackFormatError, match="float64"):
        read_weights(tmp_path / "d.npz")
    np.save(tmp_path / "one.npy", values)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(PackFormatError, match="no zip archive"):
        read_weights(tmp_path / "one.npz")
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as file:
        file.writestr("a.txt", b"text")
    with pytest.raises(PackFormatError, match="no array"):
        read_weights(tmp_path / "t.npz")
    with pytest.raises(PackFormatError, match="file of weights"):
        read_weights(tmp_path / "none.npz")


@pytest.mark.parametrize(
    "facts",
    [
        5,
        {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]},
    ],
    ids=str,
)
def test_safetensors_that_make_no_sense(facts: object, tmp_path: Path) -> None:
    text = json.dumps({"x": facts}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(PackFormatError) as caught:
        read_weights(path)
    assert caught.value.field == "x"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"12",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10**5) + b"[" * 10**5,
        struct.pack("<Q", 4) + b'{"a"',
    ],
)
def test_headers_that_make_no_sense(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    with pytest.raises(PackFormatError) as caught:
        read_weights(path)
    assert caught.value.field == "header"


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), n_kept=st.integers(0, 10**6))
def test_any_damaged_safetensors(
    position: int, value: int, n_kept: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(safetensors({"a": ("F32", np.ones((3, 2), np.float32))}))
    raw[position % len(raw)] = value
    path = tmp_path_factory.mktemp("damaged") / "w.safetensors"
    path.write_bytes(raw[: n_kept % (len(raw) + 1) or None])
    try:
        read_weights(path)
    except PackFormatError as error:
        assert error.expected


def test_quantize(tmp_path: Path) -> None:
    source = small_gguf(tmp_path / "a.gguf")
    report = quantize(source, tmp_path / "b.gguf", "q4_k", "1.0.1")
    assert report.archive is None and report.gguf == tmp_path / "b.gguf"
    facts = inspect_pack(tmp_path / "b.gguf")
    assert (facts.expert_type, facts.manifest.version) == ("q4_k", "1.0.1")
    digest = "sha256:" + sha256_of(source, nothing)
    origin = Origin(id="python_code", version="1.0.0", digest=digest)
    assert facts.manifest.training.derived_from == origin
    assert 0.04 < report.errors["site.0.expert_up.weight"] < 0.09
    assert report.errors["site.0.in.weight"] == 0, "F16 stays F16"
    with pytest.raises(InvalidRequestError, match="another one than"):
        quantize(source, tmp_path / "c.gguf", "q4_k", "1.0.0")
    with pytest.raises(InvalidRequestError, match=r"a \.gguf file"):
        quantize(source, tmp_path / "c.mbpack", "q4_k", "1.0.1")
    with pytest.raises(PackFormatError, match=r"MAJOR\.MINOR"):
        quantize(source, tmp_path / "c.gguf", "q4_k", "new")
    assert not (tmp_path / "c.gguf").exists()


def test_quantize_an_archive(tmp_path: Path) -> None:
    source, target = small_archive(tmp_path), tmp_path / "b.mbpack"
    report = quantize(source, target, "f16", "1.0.1")
    assert report.gguf is None and report.archive == target
    (tmp_path / "out").mkdir()
    assert unpack(target, tmp_path / "out", nothing) == report.manifest
    assert report.manifest.quantisation.experts == "f16"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme == "# python_code@1.0.0\n"
