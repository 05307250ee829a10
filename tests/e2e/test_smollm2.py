"""The engine on real weights: SmolLM2-135M, as the catalogue installs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modularbase import Engine, EngineOptions, SamplingParams
from tests.tools.compare import assert_same_tokens

QUESTION = [{"role": "user", "content": "How do I read a CSV file in Python?"}]
PREFIX = "You are a careful assistant. " * 60
# Lead in log-probability under which another order of summation may turn two tokens.
GAP = 0.05


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    with Engine.load(smollm2, n_ctx=2048) as loaded:
        yield loaded


def test_answers_sensibly(engine: Engine) -> None:
    answer = engine.chat(QUESTION, temperature=0, max_tokens=96)
    assert "csv" in answer.text.lower()
    assert "import" in answer.text or "open" in answer.text
    assert answer.usage.completion_tokens == len(answer.token_ids)


def test_knows_a_capital(engine: Engine) -> None:
    assert "Paris" in engine.generate("The capital of France is", temperature=0, max_tokens=8).text


def test_streamed_text_is_the_result(engine: Engine) -> None:
    params = SamplingParams(max_tokens=48, temperature=0.9, seed=11)
    streamed = "".join(engine.stream("Once upon a time", params))
    assert streamed == engine.generate("Once upon a time", params).text


def test_a_batch_gives_what_each_request_gives_alone(engine: Engine) -> None:
    prompts = [f"The number {n} is followed by" for n in range(8)]
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=2)
    handles = [engine.submit(prompt, params) for prompt in prompts]
    together = [handle.result() for handle in handles]
    for prompt, result in zip(prompts, together, strict=True):
        assert_same_tokens(engine.generate(prompt, params).token_ids, result, GAP)


def test_a_repeated_prefix_is_not_computed_again(engine: Engine) -> None:
    first = engine.generate(f"{PREFIX}Say hello.", max_tokens=8, temperature=0, logprobs=2)
    again = engine.generate(f"{PREFIX}Say hello.", max_tokens=8, temperature=0)
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 32
    assert_same_tokens(again.token_ids, first, GAP)
    assert again.timings.ttft_ms < first.timings.ttft_ms


def test_speculation_gives_the_same_tokens(smollm2: Path) -> None:
    prompt = "Repeat: one two three four five six. one two three four five six. one two"
    # In F16: the file's own type rounds activations to 8 bits, and not alike for one row and many.
    with Engine.load(smollm2, dtype="f16", n_ctx=1024) as engine:
        plain = engine.generate(prompt, max_tokens=48, temperature=0, logprobs=2, ignore_eos=True)
        drafted = engine.generate(prompt, max_tokens=48, temperature=0, n_draft=6, ignore_eos=True)
    assert_same_tokens(drafted.token_ids, plain, GAP)
    assert drafted.usage.accepted_tokens > 0


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(head="full"),
        EngineOptions(attention="reference"),
        EngineOptions(linear="reference"),
        EngineOptions(kv="bf16"),
    ],
    ids=["head", "attention", "linear", "kv_bf16"],
)
def test_other_paths_agree(smollm2: Path, options: EngineOptions) -> None:
    # In F16: the file's own type rounds activations to 8 bits, which turns a last bit into a tenth.
    text = PREFIX[:600] + "The weather today is"
    with Engine.load(smollm2, dtype="f16", n_ctx=1024) as engine:
        expected = engine.score(text).logprobs
        again = engine.generate("The sky is", max_tokens=16, temperature=0)
    with Engine.load(smollm2, dtype="f16", n_ctx=1024, options=options) as other:
        found = other.score(text).logprobs
        first = other.generate("The sky is", max_tokens=16, temperature=0, logprobs=2)
    # Rounding of KV to 8 bits of mantissa moves single tokens by less than a tenth.
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert_same_tokens(again.token_ids, first, 0.1)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_widened_weights_score_alike(engine: Engine, smollm2: Path, dtype: str) -> None:
    text = PREFIX[:600]
    with Engine.load(smollm2, dtype=dtype, n_ctx=1024) as other:  # type: ignore[arg-type]
        found = other.score(text).perplexity
    # The file's own path rounds activations to 8 bits, which costs up to a few percent here.
    assert found == pytest.approx(engine.score(text).perplexity, rel=0.05)


def test_embeddings_tell_topics_apart(engine: Engine) -> None:
    cat, kitten, tax = (
        engine.embed(text)
        for text in (
            "The cat sleeps on the sofa.",
            "A kitten is asleep on the couch.",
            "Corporate income tax rates rose last year.",
        )
    )
    assert cat @ kitten > cat @ tax


def test_cancelling_a_neighbour_changes_nothing(engine: Engine) -> None:
    alone = engine.generate("My favourite food is", max_tokens=32, temperature=0, logprobs=2)
    neighbour = engine.submit("Tell me a long story.", max_tokens=512, ignore_eos=True)
    handle = engine.submit("My favourite food is", max_tokens=32, temperature=0)
    threading.Timer(0.1, neighbour.cancel).start()
    assert_same_tokens(handle.result().token_ids, alone, GAP)
