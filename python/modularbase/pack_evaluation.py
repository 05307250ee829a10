"""What a pack does to a base, in numbers: measured with the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from modularbase.engine import Engine
from modularbase.errors import BaseLoadError
from modularbase.gguf_file import read_matrix
from modularbase.packs.build import Measured
from modularbase.packs.weights import MAX_PROBE, Probe
from modularbase.types import FloatArray, Packs

_EXACT, _ROUNDED = "exact", "rounded"
_CHUNK_TOKENS = 64  # bounds the logits held at once

NEUTRAL_TEXT = (
    "The committee met on Tuesday to review the plan. Each member had read the report, and most "
    "agreed that the costs were too high. After a short discussion they asked for a second opinion "
    "and decided to meet again in two weeks."
)
"""What rounding is measured on where a project has no test prompts."""


def logits(engine: Engine, prompt: str | Sequence[int], packs: Packs = None) -> FloatArray:
    """Logits behind every token, [n_tokens, n_vocab]; for evaluation, not for speed."""
    states = engine.hidden(prompt, engine.info["n_layer"] + 1, packs=packs)
    product: FloatArray = states @ _output_matrix(engine).T
    return product


def mean_kl(p_logits: FloatArray, q_logits: FloatArray) -> float:
    """Mean of KL(p || q) over rows of logits [n, n_vocab], in nats a token."""
    total = 0.0
    for first in range(0, len(p_logits), _CHUNK_TOKENS):
        rows = slice(first, first + _CHUNK_TOKENS)
        p, q = _log_softmax(p_logits[rows]), _log_softmax(q_logits[rows])
        total += float((np.exp(p) * (p - q)).sum())
    return max(0.0, total / len(p_logits))


class PackMeasure:
    """Measures packs that are being built, on one engine."""

    def __init__(self, engine: Engine, text: str = NEUTRAL_TEXT) -> None:
        """Measures on a text."""
        self._engine = engine
        self._tokens = engine.tokenizer.encode(text)

    def __call__(self, exact: Path, rounded: Path) -> Measured:
        """The probe of a pack, and what rounding its experts cost.

        Args:
            exact: The pack with F16 experts.
            rounded: The same with the experts it will have.

        Raises:
            ModularBaseError: The engine cannot run it; a pack that does nothing is one, too.
        """
        with self._loaded(_EXACT, exact), self._loaded(_ROUNDED, rounded):
            kl = mean_kl(
                logits(self._engine, self._tokens, _EXACT),
                logits(self._engine, self._tokens, _ROUNDED),
            )
            generation = self._engine.packs.known(_ROUNDED)
            assert generation is not None  # it was loaded just now
            tokens = tuple(self._tokens[:MAX_PROBE])
            effect = self._engine.packs.measure_effect(generation, tokens)
        return Measured(Probe(tokens, tuple(float(e) for e in effect)), kl)

    @contextmanager
    def _loaded(self, name: str, path: Path) -> Iterator[None]:
        self._engine.packs.swap(name, str(path))
        try:
            yield
        finally:
            self._engine.packs.forget(name)


def _output_matrix(engine: Engine) -> FloatArray:
    path = engine.info["path"]
    try:
        return read_matrix(path, "output.weight")
    except BaseLoadError:  # tied to the embedding
        return read_matrix(path, "token_embd.weight")


def _log_softmax(rows: FloatArray) -> FloatArray:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
