"""Importing a checkpoint: what is installed, and what is refused with which words."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modularbase import Engine
from modularbase.bases import import_checkpoint, install
from modularbase.bases.import_checkpoint import ImportOptions, import_base, write_base
from modularbase.errors import (
    BaseLoadError,
    BaseNotFoundError,
    InstallError,
    InvalidRequestError,
    ModularBaseError,
)
from modularbase.storage.digest import sha256_of
from modularbase.storage.progress import InstallProgress
from tests.tools.tiny_checkpoints import make_tiny_checkpoint

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("made") / "Tiny", "llama").folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "Tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODULARBASE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_imported_base_is_installed(folder: Path, home: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    steps: list[InstallProgress] = []
    found = import_base(folder, ImportOptions(version="1.1"), steps.append)
    assert found.name == "tiny@1.1" and found.family == "llama" and found.licence == "mit"
    assert found.path == home / "bases" / "tiny@1.1" / "tiny-1.1.gguf"
    assert found.sha256 == sha256_of(found.path, lambda _: None)
    assert list(dict.fromkeys(step.stage for step in steps)) == ["convert", "verify", "done"]
    converted = [step for step in steps if step.stage == "convert"]
    assert converted[-1].n_done == converted[-1].n_total
    assert install.resolve("Tiny@1.1") == install.resolve("tiny") == found.path
    assert install.info("tiny") == found and found in install.list_bases()
    with Engine.load("tiny@1.1", n_threads=1) as engine:
        assert (engine.base.id, engine.base.version) == ("tiny", "1.1")
        assert engine.base.digest == f"sha256:{found.sha256}"
        assert engine.chat([{"role": "user", "content": "the sea"}], max_tokens=2).text
    assert import_base(folder, ImportOptions(version="1.1")) == found  # the same content


def test_the_newest_version_answers_to_the_bare_name(folder: Path) -> None:
    for version in ("1.9", "1.10"):
        import_base(folder, ImportOptions(name="sea", version=version))
    assert install.resolve("sea").parent.name == "sea@1.10"
    install.remove("sea")
    assert install.resolve("sea").parent.name == "sea@1.9"
    install.remove("sea@1.9")
    with pytest.raises(BaseNotFoundError):
        install.resolve("sea")


def test_the_catalogue_keeps_its_names(folder: Path) -> None:
    import_base(folder, ImportOptions(name="smollm2-135m", version="1.1"))
    assert install.resolve("smollm2-135m@1.1").is_file()
    with pytest.raises(InstallError, match="base install smollm2-135m"):
        install.resolve("smollm2-135m")


def test_another_content_needs_another_version(folder: Path, home: Path) -> None:
    first = import_base(folder)
    change_tensor("model.norm.weight", lambda values: values * 2)(folder)
    with pytest.raises(InstallError, match="another version") as caught:
        import_base(folder)
    assert caught.value.kind == "exists" and install.info("tiny") == first
    assert not list((home / "bases" / ".staging").iterdir())
    assert import_base(folder, ImportOptions(version="2.0")).sha256 != first.sha256


def test_a_damaged_import_is_named_and_replaced(folder: Path) -> None:
    found = import_base(folder)
    assert found.path is not None
    with found.path.open("ab") as file:
        file.write(b"x")
    assert "damaged" in str(install.info("tiny").damage)
    assert import_base(folder).damage is None


def test_types(folder: Path, tmp_path: Path) -> None:
    paths = {kind: tmp_path / f"{kind}.gguf" for kind in ("auto", "f16", "bf16")}
    for kind, path in paths.items():
        write_base(folder, path, ImportOptions(float_type=kind))  # type: ignore[arg-type]
    assert paths["auto"].read_bytes() == paths["f16"].read_bytes() != paths["bf16"].read_bytes()
    change_tensor("lm_head.weight", lambda values: values.astype(np.float32) + 1e6)(folder)
    write_base(folder, paths["bf16"], ImportOptions(float_type="bf16"))
    with pytest.raises(BaseLoadError, match=r"lm_head\.weight.*bf16"):
        write_base(folder, paths["f16"], ImportOptions(float_type="f16"))


def test_a_failure_leaves_nothing_behind(
    folder: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: InstallProgress) -> None:
        if step.stage == "convert":
            raise KeyboardInterrupt

    out = tmp_path / "out" / "tiny.gguf"
    out.parent.mkdir()
    out.write_text("what was there")
    for action in (lambda: import_base(folder, None, interrupt), lambda: write(folder, out)):
        monkeypatch.setattr(import_checkpoint, "no_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            action()
    assert [path.name for path in out.parent.iterdir()] == ["tiny.gguf"]
    assert out.read_text() == "what was there"
    assert not (home / "bases" / "tiny@1.0.0").exists()
    assert not list((home / "bases" / ".staging").iterdir())


def write(folder: Path, out: Path) -> None:
    def interrupt(step: InstallProgress) -> None:
        raise KeyboardInterrupt

    write_base(folder, out, None, interrupt)


def change_json(name: str, **values: Any) -> Change:
    """Sets fields of a JSON file; None deletes one."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text()) | values
        kept = {key: value for key, value in fields.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def change_config(**values: Any) -> Change:
    return change_json("config.json", **values)


def change_tensor(name: str, edit: Callable[[Any], Any] | None, as_name: str = "") -> Change:
    """Replaces a tensor by what `edit` makes of it, or drops it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        values = tensors[name] if as_name else tensors.pop(name)
        if edit is not None:
            tensors[as_name or name] = np.ascontiguousarray(edit(values))
        save_file(tensors, folder / "model.safetensors")

    return change


def change_header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edits the header of the safetensors file as text."""

    def change(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + n])
        edit(header)
        text = json.dumps(header).encode()
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])

    return change


def truncate(name: str, keep: Callable[[int], int]) -> Change:
    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: keep(len(raw))])

    return change


def change_tokenizer(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "tokenizer.json").read_text())
        edit(fields)
        (folder / "tokenizer.json").write_text(json.dumps(fields))

    return change


def index_of(shard: str) -> Change:
    def change(folder: Path) -> None:
        index = {"weight_map": {"model.norm.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


NORM = "model.norm.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}

FAULTS: dict[str, tuple[Change, str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "folder of a checkpoint, found nothing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: file"),
    "config no JSON": (truncate("config.json", lambda n: n // 2), "config.json: file: .*JSON"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "found neither"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: file"),
    "architecture": (change_config(architectures=["GPT2LMHeadModel"]), "Qwen3ForCausalLM, found"),
    "two architectures": (change_config(architectures=["A", "B"]), "architectures"),
    "heads": (change_config(num_key_value_heads=4), "num_key_value_heads: expected a divisor of 6"),
    "no width": (change_config(hidden_size=None), "hidden_size: expected a positive integer"),
    "a boolean width": (change_config(hidden_size=True), "hidden_size"),
    "activation": (change_config(hidden_act="gelu"), "hidden_act: expected silu"),
    "yarn": (change_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "found 'yarn'"),
    "older yarn": (
        change_config(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling.rope_type.*found 'yarn'",
    ),
    "llama3": (
        change_config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64}),
        "high_freq_factor: expected more than",
    ),
    "part of a head": (
        change_config(rope_parameters={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor: expected 1",
    ),
    "sliding window": (change_config(layer_types=["sliding_attention"] * 3), "sliding window"),
    "quantised": (change_config(quantization_config={"bits": 4}), "not quantised"),
    "feed-forward biases": (change_config(mlp_bias=True), "mlp_bias"),
    "layers": (change_config(num_hidden_layers=2), r"model\.layers\.2\..*an unknown one"),
    "more layers": (change_config(num_hidden_layers=4), r"blk\.3\..*missing"),
    "vocabulary": (change_config(vocab_size=321), r"shape \(321, 96\).*found \(320, 96\)"),
    "tokens beyond": (change_config(vocab_size=100), r"shape \(100, 96\)"),
    "missing tensor": (change_tensor(NORM, None), r"output_norm\.weight.*missing"),
    "unknown tensor": (
        change_tensor(NORM, lambda values: values, "model.extra.weight"),
        r"model\.extra\.weight.*unknown",
    ),
    "transposed": (
        change_tensor("model.layers.0.mlp.up_proj.weight", lambda values: values.T),
        r"up_proj\.weight: expected shape \(160, 96\)",
    ),
    "NaN": (change_tensor(NORM, lambda values: values * np.nan), f"{NORM}: expected finite"),
    "integers": (
        change_tensor(NORM, lambda values: values.astype(np.int32)),
        "dtype: expected F32 or F16 or BF16, found I32",
    ),
    "cut data": (truncate("model.safetensors", lambda n: n - 2), "the file is cut short"),
    "cut header": (truncate("model.safetensors", lambda _: 100), "header length"),
    "empty file": (truncate("model.safetensors", lambda _: 0), "header length"),
    "offsets": (
        change_header(lambda header: header[NORM].update(data_offsets=[0, 4])),
        "data_offsets: expected the bytes of its shape, found 4",
    ),
    "negative offsets": (
        change_header(lambda header: header[NORM].update(data_offsets=[-8, 184])),
        "not negative",
    ),
    "no offsets": (change_header(lambda header: header[NORM].pop("data_offsets")), NORM),
    "missing shard": (index_of("model-00001-of-00002.safetensors"), "00001-of-00002.safetensors"),
    "shard elsewhere": (index_of("../model.safetensors"), "weight_map.*names of files"),
    "not in the shard": (
        lambda folder: (index_of("model.safetensors")(folder), change_tensor(NORM, None)(folder)),
        f"{NORM}, as model.safetensors.index.json says",
    ),
    "model of the tokenizer": (
        change_tokenizer(lambda fields: fields["model"].update(type="WordLevel")),
        "model.type: expected BPE",
    ),
    "normaliser": (
        change_tokenizer(lambda fields: fields.update(normalizer={"type": "Lowercase"})),
        "normalizer: expected none or NFC",
    ),
    "pre-tokenizer": (
        change_tokenizer(lambda fields: fields["pre_tokenizer"]["pretokenizers"].pop(1)),
        "pre_tokenizer: expected one that splits",
    ),
    "ids beyond": (
        change_tokenizer(lambda fields: fields["model"]["vocab"].update(beyond=320)),
        "embedding's 320 rows, found 'beyond' with 320",
    ),
    "merges": (
        change_tokenizer(lambda fields: fields["model"]["merges"].insert(0, ["never", "seen"])),
        "tokenizer.json",
    ),
    "ends": (
        change_json("generation_config.json", eos_token_id=[30, 31, 32]),
        "generation_config.json: eos_token_id: expected at most 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, folder: Path, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    change(folder)
    with pytest.raises(BaseLoadError) as caught:
        write_base(folder, tmp_path / "tiny.gguf")
    assert re.search(words, str(caught.value)), str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    "options",
    [
        ImportOptions(name="No Spaces"),
        ImportOptions(name="../up"),
        ImportOptions(name="sea@1"),
        ImportOptions(version="latest"),
    ],
    ids=str,
)
def test_names_and_versions(options: ImportOptions, folder: Path) -> None:
    with pytest.raises(InvalidRequestError):
        import_base(folder, options)


@pytest.mark.parametrize("n_bytes", [9, 200, 5_000, 60_000])
def test_every_damaged_file_is_refused_or_read(n_bytes: int, folder: Path, tmp_path: Path) -> None:
    """Whatever a byte becomes, no other exception escapes."""
    rng = np.random.default_rng(n_bytes)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        raw = bytearray((folder / name).read_bytes())
        raw[rng.integers(min(n_bytes, len(raw)))] ^= int(rng.integers(1, 256))
        (folder / name).write_bytes(raw)
    try:
        write_base(folder, tmp_path / "tiny.gguf")
    except ModularBaseError as error:
        assert str(folder) in str(error)


def test_further_end_tokens_end_a_generation(folder: Path, tmp_path: Path) -> None:
    change_json("generation_config.json", eos_token_id=[2, 30])(folder)
    write_base(folder, tmp_path / "tiny.gguf")
    with Engine.load(tmp_path / "tiny.gguf", n_threads=1) as engine:
        assert {2, 30} <= engine.tokenizer.eog_ids
