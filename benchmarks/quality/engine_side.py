"""Perplexities in the engine, as users get them."""

from __future__ import annotations

import math
import sys

from benchmarks.quality.corpora import ENGINE_BLOCKS, measured_blocks
from modularbase import Engine
from modularbase.types import Packs


def perplexity(engine: Engine, text: str, packs: Packs = None) -> float:
    """Perplexity of the first blocks of a measured text."""
    blocks = measured_blocks()[text][:ENGINE_BLOCKS].ids
    logprobs = [engine.score(block.tolist(), packs=packs).logprobs for block in blocks]
    print(f"{text} under {packs}: measured", file=sys.stderr, flush=True)
    total = sum(float(part.sum(dtype="f8")) for part in logprobs)
    return math.exp(-total / sum(len(part) for part in logprobs))
