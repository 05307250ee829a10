"""Vocabularies for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_metadata import read_gguf_metadata
from tiny_vocab import tiny_byte_level_metadata

from modularbase.bases.tokenizer import Tokenizer


@pytest.fixture
def byte_level_metadata() -> dict[str, object]:
    """Metadata of a small byte-level vocabulary; a test may change it."""
    return tiny_byte_level_metadata()


@pytest.fixture(scope="session")
def sentence_piece(llama_cpp_models_dir: Path) -> Tokenizer:
    """Llama 2's tokenizer."""
    path = llama_cpp_models_dir / "ggml-vocab-llama-spm.gguf"
    return Tokenizer.from_metadata(read_gguf_metadata(path))
