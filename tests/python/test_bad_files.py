"""Broken GGUF files: each a named error that says what is wrong, none ends the process."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TinyModelFactory
from tests.tools import load_probe
from tests.tools.gguf_edit import Array, copy_gguf, patched, tensor_entry

Outcome = dict[str, str]
Damage = Callable[[bytes], bytes]

Q, K = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
N_TENSORS_AT, N_KEYS_AT, FIRST_KEY_AT = 8, 16, 24
I32, UNUSED_TYPE = 26, 4


def at(offset: int, layout: str, value: int) -> Damage:
    return lambda image: patched(image, offset, layout, value)


def entry(tensor: str, field: str, layout: str, *values: int) -> Damage:
    return lambda image: patched(image, tensor_entry(image, tensor)[field], layout, *values)


def renamed(old: str, new: str) -> Damage:
    assert len(old) == len(new)
    return lambda image: image.replace(old.encode(), new.encode("latin-1"), 1)


def onto_its_neighbour(image: bytes) -> bytes:
    (offset,) = struct.unpack_from("<Q", image, tensor_entry(image, K)["offset"])
    return patched(image, tensor_entry(image, Q)["offset"], "<Q", offset)


# name: (what happens to the bytes, the field that the error names)
BYTES: dict[str, tuple[Damage, str]] = {
    "zero-length": (lambda image: b"", "file size"),
    "three bytes": (lambda image: image[:3], "magic"),
    "not GGUF": (lambda image: b"PK\3\4" + image[4:], "magic"),
    "a text": (lambda image: b"Once upon a time " * 100, "magic"),
    "version 1": (at(4, "<I", 1), "version"),
    "version 4": (at(4, "<I", 4), "version"),
    "big-endian": (at(4, ">I", 3), "version"),
    "only the header": (lambda image: image[:24], "count"),
    "cut in the metadata": (lambda image: image[:2000], ""),
    "cut in the directory": (lambda image: image[: tensor_entry(image, K)["type"]], "tensor"),
    "cut in the data": (lambda image: image[: len(image) // 2], "tensor"),
    "cut at the end": (lambda image: image[:-400], "tensor"),
    "2^63 tensors": (at(N_TENSORS_AT, "<Q", 1 << 63), "tensor"),
    "2^32 tensors": (at(N_TENSORS_AT, "<Q", 1 << 32), "tensor"),
    "2^63 keys": (at(N_KEYS_AT, "<Q", 1 << 63), "metadata"),
    "a key of 2^63 bytes": (at(FIRST_KEY_AT, "<Q", 1 << 63), ""),
    "no dimensions": (entry(Q, "n_dims", "<I", 0), Q),
    "five dimensions": (entry(Q, "n_dims", "<I", 5), Q),
    "2^32 - 1 dimensions": (entry(Q, "n_dims", "<I", 0xFFFFFFFF), Q),
    "a dimension of 0": (entry(Q, "dims", "<q", 0), Q),
    "a negative dimension": (entry(Q, "dims", "<q", -96), Q),
    "dimensions that overflow": (entry(Q, "dims", "<qq", 1 << 32, 1 << 32), Q),
    "a huge dimension": (entry(Q, "dims", "<qq", 1 << 40, 96), Q),
    "another shape": (entry(K, "dims", "<qq", 32, 96), K),
    "a smaller shape": (entry(Q, "dims", "<qq", 96, 48), Q),
    "an unknown type": (entry(Q, "type", "<I", 999), Q),
    "a type no longer in use": (entry(Q, "type", "<I", UNUSED_TYPE), Q),
    "a matrix of integers": (entry(Q, "type", "<I", I32), Q),
    "embeddings of integers": (entry("token_embd.weight", "type", "<I", I32), "token_embd"),
    "a head of integers": (entry("output.weight", "type", "<I", I32), "output.weight"),
    "a norm of integers": (entry("output_norm.weight", "type", "<I", I32), "output_norm"),
    "overlapping tensors": (onto_its_neighbour, "tensor"),
    "an odd offset": (entry(Q, "offset", "<Q", 33), Q),
    "an offset outside": (entry(Q, "offset", "<Q", 1 << 40), Q),
    "an offset that wraps": (entry(Q, "offset", "<Q", (1 << 64) - 32), Q),
    "a tensor twice": (renamed("blk.1.attn_q.weight", Q), Q),
    "a name that is not UTF-8": (renamed(Q, "blk.0.attn_q.weigh\xff"), "tensor"),
}

# name: (changed keys, keys and tensors left out, the field that the error names)
CONTENT: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "an unknown architecture": ({"general.architecture": "mamba9"}, [], "general.architecture"),
    "a missing matrix": ({}, [Q], Q),
    "a missing norm": ({}, ["output_norm.weight"], "output_norm.weight"),
    "a missing embedding": ({}, ["token_embd.weight"], "token_embd.weight"),
    "no heads": ({"llama.attention.head_count": 0}, [], "head_count"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 4}, [], "head_count_kv"),
    "no layers": ({"llama.block_count": 0}, [], "block_count"),
    "a layer too many": ({"llama.block_count": 4}, [], "blk.3"),
    "a million layers": ({"llama.block_count": 1_000_000}, [], "block_count"),
    "no context": ({"llama.context_length": 0}, [], "context_length"),
    "another width": ({"llama.embedding_length": 64}, [], "shape"),
    "an endless width": ({"llama.embedding_length": 4_000_000_000}, [], "embedding_length"),
    "wide heads": ({"llama.attention.key_length": 1000}, [], "key_length"),
    "an odd rotation": ({"llama.rope.dimension_count": 15}, [], "rope.dimension_count"),
    "a rotation wider than a head": ({"llama.rope.dimension_count": 64}, [], "dimension_count"),
    "a base that is no number": ({"llama.rope.freq_base": float("nan")}, [], "rope"),
    "an epsilon that is no number": (
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        [],
        "layer_norm_rms_epsilon",
    ),
    "no epsilon": ({}, ["llama.attention.layer_norm_rms_epsilon"], "layer_norm_rms_epsilon"),
    "no width": ({}, ["llama.embedding_length"], "embedding_length"),
    "an unknown rope scaling": ({"llama.rope.scaling.type": "spiral"}, [], "rope.scaling.type"),
    "experts": ({"llama.expert_count": 8}, [], "expert_count"),
    "no vocabulary": ({}, ["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens"),
    "an unknown tokenizer": ({"tokenizer.ggml.model": "runes"}, [], "tokenizer.ggml.model"),
}
N_MUTATIONS = 150
WEIGHTS = (Q, "token_embd.weight", "output.weight")
N_TYPES = 48  # more than ggml has
# Types whose blocks of 32 divide the tiny model's rows, and which take less room than F32.
SOUND_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "IQ4_NL": 20,
    "BF16": 30,
    "MXFP4": 39,
}


def not_a_number(name: str, data: Array, kind: Any) -> tuple[Array, Any]:
    return (np.full_like(data, np.nan) if name == "output.weight" else data), kind


def mutated(image: bytes, seed: int) -> bytes:
    """Changes a few bytes of the metadata or of the tensor directory."""
    draw = random.Random(seed)
    out = bytearray(image)
    vocabulary = (image.index(b"tokenizer.ggml.tokens"), image.index(b"token_embd.weight"))
    parts = [
        range(vocabulary[0]),
        range(vocabulary[1], tensor_entry(image, "output.weight")["n_dims"]),
    ]
    for _ in range(draw.randint(1, 3)):
        out[draw.choice(draw.choice(parts))] = draw.choice(
            [0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)]
        )
    return bytes(out)


@pytest.fixture(scope="module")
def outcomes(
    tiny_model: TinyModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """What comes of each file; one process tries all, another goes on where it ends."""
    folder = tmp_path_factory.mktemp("bad_files")
    source = tiny_model().path
    image = source.read_bytes()
    files = {"sound": source}

    def write(name: str, content: bytes) -> None:
        files[name] = folder / f"{len(files)}.gguf"
        files[name].write_bytes(content)

    for name, (damage, _) in BYTES.items():
        write(name, damage(image))
    for name, (changes, drop, _) in CONTENT.items():
        files[name] = folder / f"{len(files)}.gguf"
        copy_gguf(source, files[name], changes=changes, drop=drop)
    files["weights that are no numbers"] = copy_gguf(source, folder / "nan.gguf", edit=not_a_number)
    for tensor in WEIGHTS:
        for kind in range(N_TYPES):
            write(f"{tensor} {kind}", entry(tensor, "type", "<I", kind)(image))
    for seed in range(N_MUTATIONS):
        write(f"mutation {seed}", mutated(image, seed))
    return tried(files)


def tried(files: dict[str, Path]) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    left = [(name, f"keep {path}") for name, path in files.items()]
    while left:
        done = subprocess.run(
            [sys.executable, load_probe.__file__],
            input="\n".join(line for _, line in left) + "\n",
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if len(answers) < len(left):
            words = f"exit code {done.returncode}: {done.stderr[-500:]}"
            answers.append({"error": "the process ended", "field": "", "message": words})
        for (name, _), answer in zip(left, answers, strict=False):
            found[name] = answer
        left = left[len(answers) :]
    return found


def test_the_sound_file_works(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["sound"]["error"] == ""


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome["error"] == "BaseLoadError", outcome
    assert BYTES[name][1] in outcome["field"], outcome
    assert ".gguf" in outcome["message"]


@pytest.mark.parametrize("name", CONTENT)
def test_wrong_content(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    of_tokenizer = "tokenizer" in CONTENT[name][2]
    assert outcome["error"] == ("TokenizerError" if of_tokenizer else "BaseLoadError"), outcome
    assert CONTENT[name][2] in outcome["field"], outcome


@pytest.mark.parametrize("tensor", WEIGHTS)
def test_every_type_number(tensor: str, outcomes: dict[str, Outcome]) -> None:
    # The bytes mean nothing as another type, so a sound one may still give no numbers.
    allowed = ("", "BaseLoadError", "ModularBaseError")
    for kind in range(N_TYPES):
        outcome = outcomes[f"{tensor} {kind}"]
        assert outcome["error"] in allowed, (kind, outcome)
        assert (outcome["error"] == "BaseLoadError") == (kind not in SOUND_TYPES.values()), outcome


@pytest.mark.parametrize("name", ["weights that are no numbers", "mutations"])
def test_nothing_worse_than_a_named_error(name: str, outcomes: dict[str, Outcome]) -> None:
    if name != "mutations":
        assert outcomes[name]["error"].endswith("Error"), outcomes[name]
        return
    found = [outcomes[f"mutation {seed}"] for seed in range(N_MUTATIONS)]
    for seed, outcome in enumerate(found):
        assert not outcome["error"].startswith(("bug", "the process")), (seed, outcome)
    assert {outcome["error"] for outcome in found} >= {"BaseLoadError", "TokenizerError", ""}
