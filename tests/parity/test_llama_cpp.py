"""The engine against llama.cpp (llama-cpp-python) on the same file and type."""

from __future__ import annotations

import math
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest

from modularbase import Engine, EngineOptions
from tests.conftest import TinyModelFactory
from tests.tools.llama_cpp_peer import LlamaCpp, log_softmax
from tests.tools.tiny_models import N_VOCAB

IDS = np.random.default_rng(7).integers(0, N_VOCAB, 200).tolist()

# 600 tokens of prose: as much as a test can wait for.
TEXT = pydoc_data.topics.topics["naming"] + pydoc_data.topics.topics["import"]
N_SCORED = 600

# Both keep KV in F16 and sum F32 products, in another order.
EXACT = 5e-3
# Lead in logits under which a token may change: both round activations to F16's 11 bits of
# mantissa, at other places, which moves logits of SmolLM2 by up to a few hundredths.
GREEDY_GAP = 0.1
# Of the perplexity. Q4_1 rounds activations to 8 bits in blocks of 32, so
# that a last bit moves a token's log-probability by 0.06 (mean); 600 tokens average that to 0.4 %.
PERPLEXITY = {"f16": 1e-3, "q4_1": 1e-2}

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "import numpy as np\n\n",
    "To boil an egg, first",
    "Dear Sir or Madam,\n",
    "The derivative of x squared is",
    "SELECT name FROM users WHERE",
    "Water is made of",
    "Les plus grandes villes de France sont",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, the first man",
    '{"name": "Ada", "age":',
    "Photosynthesis is the process by which",
    "Roses are red, violets are",
    "# Installation\n\nTo install the package,",
    "A prime number is a number that",
    "<html>\n<head>\n",
    "Albert Einstein was born in",
]


@pytest.mark.parametrize("path", ["fused", "reference"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_logprobs(family: str, path: str, tiny_model: TinyModelFactory) -> None:
    model = tiny_model(family)
    options = EngineOptions(attention=path, linear=path)  # type: ignore[arg-type]
    with (
        LlamaCpp(model.path) as peer,
        Engine.load(model.path, dtype="keep", options=options) as engine,
    ):
        np.testing.assert_allclose(engine.score(IDS).logprobs, peer.logprobs(IDS), atol=EXACT)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_distribution_of_the_next_token(family: str, tiny_model: TinyModelFactory) -> None:
    model = tiny_model(family)
    with LlamaCpp(model.path) as peer, Engine.load(model.path, dtype="keep") as engine:
        expected = log_softmax(peer.logits(IDS)[-1:])[0]
        result = engine.generate(IDS, max_tokens=1, temperature=0, logprobs=N_VOCAB)
    assert result.logprobs is not None
    found = result.logprobs[0].top
    assert len(found) == N_VOCAB
    np.testing.assert_allclose([found[i] for i in range(N_VOCAB)], expected, atol=EXACT)


@pytest.mark.parametrize("dtype", ["f16", "q4_1"])
def test_perplexity_of_the_default_base(dtype: str, smollm2: Path, smollm2_f16: Path) -> None:
    path = smollm2_f16 if dtype == "f16" else smollm2
    with LlamaCpp(path, n_ctx=1024) as peer, Engine.load(path, dtype="keep", n_threads=1) as engine:
        ids = engine.tokenizer.encode(TEXT)[:N_SCORED]
        assert len(ids) == N_SCORED
        score = engine.score(ids)
        expected = math.exp(-peer.logprobs(ids).mean())
    assert score.perplexity == pytest.approx(expected, rel=PERPLEXITY[dtype])


def test_greedy_continuations_of_the_default_base(smollm2_f16: Path) -> None:
    n_clear = 0
    with (
        LlamaCpp(smollm2_f16) as peer,
        Engine.load(smollm2_f16, dtype="keep", n_threads=1) as engine,
    ):
        handles = [
            engine.submit(prompt, max_tokens=64, temperature=0, ignore_eos=True)
            for prompt in PROMPTS
        ]
        for prompt, handle in zip(PROMPTS, handles, strict=True):
            ids = engine.tokenizer.encode(prompt)
            steps = peer.greedy(ids, 64)
            for found, (token, lead) in zip(handle.result().token_ids, steps, strict=True):
                if found != token:
                    assert lead < GREEDY_GAP, f"{prompt!r}: {found} and not {token}, led by {lead}"
                    break
                n_clear += 1
    assert n_clear >= 64 * len(PROMPTS) / 2  # else the tolerance hides what is to be tested


def test_tokenizer_of_the_default_base(smollm2: Path) -> None:
    texts = [
        *PROMPTS,
        TEXT[:4000],
        "naïve 医疗问答包 🙂\t\n  x  1234567",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    with LlamaCpp(smollm2) as peer, Engine.load(smollm2, dtype="keep") as engine:
        for text in texts:
            assert engine.tokenizer.encode(text) == peer.tokenize(text)
