"""Every encoding llama.cpp publishes for its vocabularies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from gguf_metadata import read_gguf_metadata

from modularbase.bases.tokenizer import Tokenizer

# The first eight are required; the rest use rules of the same table.
VOCABULARIES = (
    "llama-bpe",
    "qwen2",
    "llama-spm",
    "phi-3",
    "gpt-2",
    "starcoder",
    "refact",
    "command-r",
    "qwen35",
    "mpt",
    "falcon",
    "deepseek-coder",
)


@cache
def load(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(read_gguf_metadata(path))


def cases(path: Path) -> list[tuple[str, list[int]]]:
    # newline="": the texts contain bare carriage returns
    with Path(f"{path}.inp").open(encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]  # each case ends with it
    with Path(f"{path}.out").open(encoding="utf-8") as file:
        ids = [[int(i) for i in line.split()] for line in file]
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_encodes_as_llama_cpp(llama_cpp_models_dir: Path, name: str) -> None:
    path = llama_cpp_models_dir / f"ggml-vocab-{name}.gguf"
    tokenizer = load(path)
    expected = cases(path)
    assert len(expected) >= 46
    wrong = {t: (got, ids) for t, ids in expected if (got := tokenizer.encode_plain(t)) != ids}
    assert not wrong


@pytest.mark.parametrize("name", VOCABULARIES)
def test_decodes_to_the_text(llama_cpp_models_dir: Path, name: str) -> None:
    path = llama_cpp_models_dir / f"ggml-vocab-{name}.gguf"
    tokenizer = load(path)
    for text, ids in cases(path):
        assert tokenizer.decode(ids) == text
