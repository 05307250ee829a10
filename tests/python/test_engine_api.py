"""What callers see of an engine: prompts, parameters, results, scores, hidden states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine, EngineOptions, SamplingParams
from modularbase.errors import ContextLengthError, InvalidRequestError, KvCacheFullError
from tests.tools.tiny_models import N_CTX, N_EMBD, N_LAYER, N_VOCAB
from tests.tools.tiny_requests import ROUNDING, block_bytes, ids, load

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
END = 257  # the tiny vocabulary's end of generation
TEXT = "the cat"


def only(*tokens: int) -> dict[int, float]:
    """A bias that leaves these tokens to choose from."""
    return {i: -math.inf for i in range(N_VOCAB) if i not in tokens}


def test_a_prompt_is_text_or_token_ids(engine: Engine) -> None:
    encoded = engine.tokenizer.encode(TEXT)
    expected = engine.generate(TEXT, max_tokens=8, **GREEDY)
    assert expected.usage.prompt_tokens == len(encoded) < len(TEXT)  # "th" is one token
    prompts: list[Any] = [encoded, tuple(encoded), np.array(encoded, np.int32)]
    for prompt in prompts:
        assert engine.generate(prompt, max_tokens=8, **GREEDY).token_ids == expected.token_ids
    assert expected.text == engine.tokenizer.decode_continuation(expected.token_ids)


def test_parameters_as_object_and_keywords(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, top_k=0, seed=3, ignore_eos=True)
    expected = engine.generate(TEXT, params).token_ids
    assert len(expected) == 12
    fields: dict[str, Any] = {
        "max_tokens": 12,
        "temperature": 1.5,
        "top_k": 0,
        "seed": 3,
        "ignore_eos": True,
    }
    assert engine.generate(TEXT, **fields).token_ids == expected
    assert engine.generate(TEXT, params, max_tokens=5).token_ids == expected[:5]
    assert engine.generate(TEXT, params, seed=4).token_ids != expected
    assert engine.submit(TEXT, params).result(20).token_ids == expected
    with pytest.raises(InvalidRequestError, match="temprature") as caught:
        engine.generate(TEXT, temprature=1)
    assert "temperature" in caught.value.expected


def test_seeds(engine: Engine) -> None:
    arguments: dict[str, Any] = {"max_tokens": 20, "temperature": 2.0, "top_k": 0, "min_p": 0.0}

    def tokens(seed: int | None) -> list[int]:
        return engine.generate(TEXT, **arguments, seed=seed, ignore_eos=True).token_ids

    assert tokens(0) == tokens(0) != tokens(1)
    assert tokens(2**64 - 1) == tokens(2**64 - 1)
    assert tokens(None) != tokens(None)


def test_generation_ends(engine: Engine) -> None:
    ended = engine.generate(TEXT, max_tokens=8, temperature=0, logit_bias={END: 100.0})
    assert (ended.finish_reason, ended.token_ids, ended.text) == ("stop", [], "")
    went_on = engine.generate(TEXT, max_tokens=8, **GREEDY, logit_bias={END: 100.0})
    assert (went_on.finish_reason, went_on.token_ids) == ("length", [END] * 8)
    assert went_on.text == ""  # a control token is no text
    late = engine.generate(ids(8), **GREEDY, timeout_s=0.001)
    assert late.finish_reason == "deadline"
    assert len(late.token_ids) == late.usage.completion_tokens < N_CTX - 8


def test_without_max_tokens_the_context_ends_it(chat_model: Path) -> None:
    with Engine.load(chat_model, n_threads=1, n_ctx=100) as engine:
        assert engine.info["n_ctx"] == 100
        result = engine.generate(ids(30), **GREEDY)
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 70
        assert len(engine.generate(ids(99), max_tokens=1, **GREEDY).token_ids) == 1
        for call in (
            lambda: engine.generate(ids(100)),
            lambda: engine.generate(ids(30), max_tokens=71),
            lambda: engine.score(ids(101)),
            lambda: engine.embed(ids(101)),
        ):
            with pytest.raises(ContextLengthError) as caught:
                call()
            assert (caught.value.n_tokens, caught.value.n_ctx) == (101, 100)


def test_a_request_that_never_fits_is_refused_and_others_wait(engine: Engine) -> None:
    n_bytes = 3 * block_bytes(engine)
    options = EngineOptions(kv_budget_bytes=n_bytes)
    with Engine.load(engine.info["path"], n_threads=1, options=options) as small:
        assert small.info["kv_bytes"] == n_bytes
        with pytest.raises(KvCacheFullError) as caught:
            small.generate(ids(150), max_tokens=60)
        assert caught.value.limit_bytes == n_bytes < caught.value.needed_bytes
        # Each of these takes all of it, so they run one after the other.
        running = [small.submit(ids(150, seed=i), max_tokens=30, **GREEDY) for i in range(3)]
        for generation in running:
            assert len(generation.result(30).token_ids) == 30


def test_more_requests_than_may_run_at_once(chat_model: Path) -> None:
    with load(chat_model, n_sequences=2) as engine:
        running = [engine.submit(ids(5, seed=i), max_tokens=40, **GREEDY) for i in range(7)]
        most = 0
        for generation in running:
            while not generation.finished():
                most = max(most, engine.stats["n_running"])
            assert len(generation.result().token_ids) == 40
        assert most <= 2


def test_logit_bias(engine: Engine) -> None:
    chosen = engine.generate(TEXT, max_tokens=5, **GREEDY, logit_bias={65: 100.0})
    assert chosen.text == "AAAAA"
    drawn = engine.generate(
        TEXT, max_tokens=30, temperature=5.0, seed=1, logit_bias=only(65, 66, 67), min_p=0.0
    )
    assert set(drawn.text) == {"A", "B", "C"}


def test_logprobs(engine: Engine) -> None:
    arguments: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 1}
    assert engine.generate(TEXT, **arguments).logprobs is None
    for n in (0, 3, N_VOCAB):
        result = engine.generate(TEXT, **arguments, logprobs=n, ignore_eos=True)
        assert result.logprobs is not None
        assert [entry.token_id for entry in result.logprobs] == result.token_ids
        for entry in result.logprobs:
            assert len(entry.top) == n
            assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
            assert entry.top.get(entry.token_id, entry.logprob) == entry.logprob
            if n == N_VOCAB:
                assert math.fsum(map(math.exp, entry.top.values())) == pytest.approx(1, abs=1e-5)


def test_usage_and_timings(own_engine: Engine) -> None:
    prompt = ids(100)
    for n_cached in (0, 99):  # the last row is always computed
        result = own_engine.generate(prompt, max_tokens=10, **GREEDY)
        usage, timings = result.usage, result.timings
        assert (usage.prompt_tokens, usage.completion_tokens) == (100, 10)
        assert usage.cached_tokens == n_cached
        assert usage.cached_lower_tokens == n_cached
        assert (usage.drafted_tokens, usage.accepted_tokens) == (0, 0)
        assert min(timings.queue_ms, timings.prefill_ms, timings.decode_ms) > 0
        assert timings.ttft_ms == timings.queue_ms + timings.prefill_ms
        assert timings.prefill_tps == pytest.approx(1e3 * (100 - n_cached) / timings.prefill_ms)
        assert timings.decode_tps == pytest.approx(1e3 * 9 / timings.decode_ms)


def test_score(engine: Engine) -> None:
    generated = engine.generate(ids(20), max_tokens=30, **GREEDY, logprobs=0)
    assert generated.logprobs is not None
    whole = [*ids(20), *generated.token_ids]
    score = engine.score(whole)
    assert score.token_ids == whole
    assert score.logprobs.shape == (49,)
    assert score.logprobs.dtype == np.float32
    expected = [entry.logprob for entry in generated.logprobs]
    np.testing.assert_allclose(score.logprobs[19:], expected, atol=ROUNDING, rtol=0)
    assert score.perplexity == pytest.approx(math.exp(-score.logprobs.mean()))
    assert engine.score(TEXT).token_ids == engine.tokenizer.encode(TEXT)


def test_hidden_and_embed(engine: Engine) -> None:
    prompt = ids(300)
    for layer in range(N_LAYER + 2):
        states = engine.hidden(prompt, layer)
        assert states.shape == (300, N_EMBD)
        assert states.dtype == np.float32
        assert np.isfinite(states).all()
    for pooling, pooled in (("mean", states.mean(axis=0)), ("last", states[-1])):
        vector = engine.embed(prompt, pooling=pooling)  # type: ignore[arg-type]
        assert vector.shape == (N_EMBD,)
        np.testing.assert_allclose(vector, pooled / np.linalg.norm(pooled), atol=1e-5)
    assert (engine.embed(TEXT) == engine.embed(engine.tokenizer.encode(TEXT))).all()


def test_chat(engine: Engine) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    prompt = engine.chat_prompt(messages)
    assert prompt == engine.tokenizer.encode("[system]be\n[user]hi\n[a]")
    answer = engine.chat(messages, max_tokens=10, **GREEDY)
    assert answer.token_ids == engine.generate(prompt, max_tokens=10, **GREEDY).token_ids
    assert answer.usage.prompt_tokens == len(prompt)


def test_info(engine: Engine, chat_model: Path) -> None:
    info = engine.info
    assert (info["path"], info["family"], info["device"]) == (str(chat_model), "llama", "CPU")
    assert (info["n_vocab"], info["n_embd"], info["n_layer"]) == (N_VOCAB, N_EMBD, N_LAYER)
    assert info["weight_type"] == "f32"
    assert info["kv_bytes"] == info["n_kv_blocks"] * block_bytes(engine)
