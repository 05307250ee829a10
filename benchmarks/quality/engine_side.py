"""Perplexities in the engine, as users get them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.quality.corpora import MEASURED, measured_blocks
from modularbase import Engine
from modularbase.types import Packs


def perplexities(
    engine: Engine, packs: Packs = None, texts: Sequence[str] = MEASURED
) -> Mapping[str, float]:
    """Perplexity of texts."""
    found = {}
    for name in texts:
        blocks = measured_blocks()[name]
        logprobs = [engine.score(block.tolist(), packs=packs).logprobs for block in blocks.ids]
        total = sum(float(part.sum(dtype="f8")) for part in logprobs)
        found[name] = math.exp(-total / sum(len(part) for part in logprobs))
    return found
