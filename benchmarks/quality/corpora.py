"""Texts as blocks of tokens: the same ones for training, for early stopping and for the table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from benchmarks.ours import installed_base
from benchmarks.paths import CACHE
from modularbase.gguf_file import read_metadata
from modularbase.training.data import TokenBlocks, pack_blocks
from modularbase.training.encoding import Encoder
from modularbase.training.texts import read_documents
from packs.recipes import RECIPES
from packs.texts import make

TEXTS = CACHE / "texts"
DOMAINS = ("python_code", "medical", "chinese_classics")
NEUTRAL = "neutral"
OTHERS = ("prose", "manual_pages")  # of kinds that nothing is trained on
MEASURED = (*DOMAINS, NEUTRAL, *OTHERS)
BLOCK_TOKENS = 256
MEASURED_BLOCKS = 64  # in PyTorch
ENGINE_BLOCKS = 4  # the first of these in the engine: enough for ratios on the same text


def text_file(name: str, part: str) -> Path:
    """The file of a text's part, made where it is missing."""
    path = TEXTS / name / f"{part}.jsonl"
    if not path.exists():
        make(name, TEXTS, CACHE / "packages")
    return path


@functools.cache
def blocks(name: str, part: str) -> TokenBlocks:
    """The blocks of a text's part, of 256 tokens."""
    return pack_blocks(read_documents([text_file(name, part)]), _encoder(), BLOCK_TOKENS)


@functools.cache
def measured_blocks() -> Mapping[str, TokenBlocks]:
    """What the table is measured on, by text."""
    assert set(MEASURED) == set(RECIPES)
    return {name: blocks(name, "test")[:MEASURED_BLOCKS] for name in MEASURED}


@functools.cache
def _encoder() -> Encoder:
    """The default base's."""
    return Encoder(read_metadata(installed_base()))
