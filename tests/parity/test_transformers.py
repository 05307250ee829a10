"""Logits and hidden states against transformers in F32, on tiny random models of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modularbase import Engine, EngineOptions
from tests.tools.tiny_models import N_LAYER, N_VOCAB, make_tiny_model, reference_logits

IDS = np.random.default_rng(1).integers(0, N_VOCAB, 150).tolist()

# F32 sums in another order over n_in <= 160: a few units of 1e-6 a layer.
EXACT = 2e-4
# Activations are rounded to the type the CPU multiplies (8 bits of mantissa for BF16).
ROUNDED = {"f32": EXACT, "f16": 2e-2, "bf16": 8e-2, "q8_0": 8e-2}


def expected_logprobs(logits: np.ndarray) -> np.ndarray:
    """ln p of each token given those before it."""
    table = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    expected: np.ndarray = table[np.arange(len(IDS) - 1), IDS[1:]]
    return expected


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("path", ["fused", "reference"])
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
def test_f32_logprobs(family: str, path: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path / "tiny.gguf", tied=tied)
    options = EngineOptions(attention=path, linear=path, head="full", kv="f16")  # type: ignore[arg-type]
    with Engine.load(model.path, dtype="keep", options=options) as engine:
        found = engine.score(IDS).logprobs
    # The KV cache is F16 here and F32 there.
    np.testing.assert_allclose(found, expected_logprobs(reference_logits(model, IDS)), atol=5e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_other_weight_types(family: str, dtype: str, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path / "tiny.gguf", dtype=dtype)
    with Engine.load(model.path, dtype="keep") as engine:
        found = engine.score(IDS).logprobs
    expected = expected_logprobs(reference_logits(model, IDS))
    np.testing.assert_allclose(found, expected, atol=ROUNDED[dtype] + 5e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hidden_states_of_every_layer(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path / "tiny.gguf")
    with torch.no_grad():
        states = model.reference(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    with Engine.load(model.path, dtype="keep") as engine:
        for layer in range(N_LAYER):
            np.testing.assert_allclose(
                engine.hidden(IDS, layer), states[layer][0].numpy(), atol=5e-3
            )
        # transformers' last hidden state is after the output norm.
        np.testing.assert_allclose(
            engine.hidden(IDS, N_LAYER + 1), states[-1][0].numpy(), atol=1e-2
        )
        last = engine.embed(IDS, pooling="last")
    expected = states[-1][0, -1].numpy()
    np.testing.assert_allclose(last, expected / np.linalg.norm(expected), atol=2e-3)
