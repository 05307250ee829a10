"""Conversations: the same answers as without one, and what is kept of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine
from modularbase.context_types import ContextOptions, Tier
from modularbase.errors import (
    CancelledError,
    ContextBudgetError,
    ContextLengthError,
    InvalidRequestError,
)
from modularbase.types import KvKind, Message
from tests.python.conftest import LoadEngine

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
CHATTER = "so many words about the weather and the garden and the long way home today "


@pytest.mark.parametrize("kv", ["f16", "q8_0", "tiered"])
def test_turns_give_what_their_tokens_give(load: LoadEngine, kv: KvKind) -> None:
    engine = load(kv)
    with engine.conversation() as talk:
        for turn in ("hello there", "and now?", "thank you"):
            result = talk.chat(turn, **GREEDY)
            prompt = talk.token_ids[: -len(result.token_ids)]
            assert engine.generate(list(prompt), **GREEDY).token_ids == result.token_ids
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 3


def test_a_turn_costs_what_is_new_in_it(load: LoadEngine) -> None:
    engine = load(prefix_cache="off")
    with engine.conversation() as talk:
        talk.chat(CHATTER * 8, **GREEDY)
        known = len(talk.token_ids)
        result = talk.chat("more?", **GREEDY)
        # The last token of an answer is not computed until something follows it.
        assert result.usage.cached_tokens >= known - 1


def test_context_is_counted(load: LoadEngine) -> None:
    with load("tiered").conversation() as talk:
        for _ in range(6):
            report = talk.chat(CHATTER * 8, **GREEDY).context
        assert report is not None
        state_tokens = sum(report.tokens.values()) + report.window_tokens
        assert len(talk.token_ids) - state_tokens in (0, 1)  # the last one is not computed yet
        assert report.tokens[Tier.KEY] >= 16
        assert report.tokens[Tier.IMPORTANT] > 0
        assert report.n_bytes[Tier.IMPORTANT] < report.exact_bytes
        assert sum(d.n_tokens for d in report.decisions) == len(talk.token_ids)


def test_a_budget_holds_whatever_blocks_leave_unfilled(load: LoadEngine) -> None:
    """What the engine has allocated, turn after turn, once it knows how full its blocks are."""
    options = ContextOptions(
        budget_bytes=500_000, demote_below=10.0, demote_after_checks=1, max_fit_error=1e9
    )
    with load("tiered").conversation(context=options) as talk:
        reports = [talk.chat(f"{word} {CHATTER * 3}", **GREEDY).context for word in "abcdefghijkl"]
    kept = [report.total_bytes for report in reports if report]
    assert len(kept) == 12 and max(kept) > 0.7 * options.budget_bytes
    assert sum(n_bytes > options.budget_bytes for n_bytes in kept) <= 1
    assert kept[-1] <= options.budget_bytes


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_what_a_caller_calls_redundant_becomes_slots(load: LoadEngine, attention: str) -> None:
    with load("tiered", attention=attention).conversation() as talk:
        message: Message = {"role": "user", "content": CHATTER * 16, "tier": "redundant"}
        talk.chat(message, **GREEDY)
        for _ in range(4):
            report = talk.chat(CHATTER * 4, **GREEDY).context
        assert report is not None
        assert report.tokens[Tier.REDUNDANT] > 0
        assert any(d.tier is Tier.REDUNDANT for d in report.decisions)


@pytest.mark.parametrize("attention", ["fused", "reference"])
def test_what_the_newest_message_resembles_is_read_again(load: LoadEngine, attention: str) -> None:
    wanted = "my aunt keeps bees behind her house and sells honey on fine mornings in the village"
    options = ContextOptions(
        budget_bytes=350_000,
        demote_below=10.0,
        demote_after_checks=1,
        max_fit_error=1e9,
        rehydrate_above=0.5,
    )
    with load("tiered", attention=attention).conversation(context=options) as talk:
        talk.chat(CHATTER, **GREEDY)
        talk.chat(wanted, **GREEDY)
        for word in ("garden", "weather", "window", "kitchen", "holiday"):
            report = talk.chat(f"{word} " * 24, **GREEDY).context
            assert report is not None and report.rehydrated_tokens == 0
        assert report is not None
        (told,) = [d for d in report.decisions if wanted in d.text]
        assert told.tier is Tier.REDUNDANT
        report = talk.chat(wanted + "?", **GREEDY | {"max_tokens": 1}).context
        assert report is not None and report.rehydrated_tokens == told.n_tokens


@pytest.mark.parametrize(
    ("kv", "attention"), [("f16", "fused"), ("tiered", "fused"), ("tiered", "reference")]
)
def test_a_conversation_outgrows_its_base(
    load: LoadEngine, tmp_path: Path, kv: KvKind, attention: str
) -> None:
    engine = load(kv, n_ctx=1024, attention=attention)
    rule = "You must always call me Ada."
    with engine.conversation() as talk:
        talk.chat(rule, **GREEDY)
        cached: list[float] = []
        for turn in range(16):
            result = talk.chat(f"{turn} {CHATTER * 2}", **GREEDY)
            assert len(talk.token_ids) <= 1024
            cached.append(result.usage.cached_tokens / len(talk.token_ids))
        assert len(talk.messages) == 34
        assert rule in engine.tokenizer.decode(talk.token_ids)
        # What is left was moved, not computed again.
        assert min(cached[1:]) > 0.5, cached
        if kv == "tiered":
            report = result.context
            assert report is not None and report.forgotten_tokens > 500
            assert report.total_tokens in (len(talk.token_ids), len(talk.token_ids) - 1)
            talk.save(tmp_path / "talk.mbconv")
            with engine.conversation() as other:
                other.restore(tmp_path / "talk.mbconv")
                again = other.chat("and?", **GREEDY)
            answer = talk.chat("and?", **GREEDY)
            assert again.token_ids == answer.token_ids
            assert again.context is not None and answer.context is not None
            assert again.context.forgotten_tokens == answer.context.forgotten_tokens


def test_rules_alone_can_be_too_long(load: LoadEngine) -> None:
    with load("tiered", n_ctx=512).conversation() as talk:
        for number in range(3):
            talk.chat(f"You must always say {number} when I call. " * 3, **GREEDY)
        before = talk.token_ids
        with pytest.raises(ContextLengthError):
            for number in range(8):
                before = talk.token_ids
                talk.chat(f"You must never say {number} when I call. " * 3, **GREEDY)
        assert talk.token_ids == before


def test_a_budget_below_the_floors_is_refused_before_the_turn(load: LoadEngine) -> None:
    options = ContextOptions(budget_bytes=1000)
    with load("tiered").conversation(context=options) as talk:
        with pytest.raises(ContextBudgetError):
            talk.chat(
                [{"role": "system", "content": CHATTER * 4}, {"role": "user", "content": "hi"}]
            )
        assert talk.messages == ()


def test_a_failed_turn_leaves_no_trace(load: LoadEngine) -> None:
    engine = load("tiered")
    with engine.conversation() as talk:
        talk.chat("hello", **GREEDY)
        before = (talk.messages, talk.token_ids)
        with pytest.raises(InvalidRequestError):
            talk.chat("again", temperature=-1.0)
        with pytest.raises(InvalidRequestError, match="no_such"):
            talk.chat("again", no_such=1)
        for _ in talk.stream("again", **{**GREEDY, "max_tokens": 400}):
            break
        assert (talk.messages, talk.token_ids) == before
        again = talk.chat("again", **GREEDY)
        prompt = talk.token_ids[: -len(again.token_ids)]
        assert engine.generate(list(prompt), **GREEDY).token_ids == again.token_ids


def test_a_streamed_turn_is_a_turn(load: LoadEngine) -> None:
    engine = load()
    with engine.conversation() as talk, engine.conversation() as other:
        text = "".join(talk.stream("hello", **GREEDY))
        assert text == other.chat("hello", **GREEDY).text
        assert talk.token_ids == other.token_ids


def test_one_turn_at_a_time(load: LoadEngine) -> None:
    with load().conversation() as talk:
        stream = talk.stream("hello", **{**GREEDY, "max_tokens": 400})
        next(stream)
        with pytest.raises(InvalidRequestError, match="one turn"):
            talk.chat("now", **GREEDY)
        stream.close()
        talk.chat("now", **GREEDY)


def test_closed(load: LoadEngine) -> None:
    engine = load("tiered")
    talk = engine.conversation()
    talk.chat("hello", **GREEDY)
    talk.close()
    talk.close()
    with pytest.raises(CancelledError):
        talk.chat("hello", **GREEDY)


def test_conversations_give_way_and_come_back(load: LoadEngine) -> None:
    """Memory for two of them: each turn computes again what another one has pushed out."""
    roomy = load("q4_0", n_batch=64)
    block_bytes = roomy.info["kv_bytes"] // roomy.info["n_kv_blocks"]
    engine = load("q4_0", n_batch=64, kv_budget_bytes=20 * block_bytes)
    texts = [CHATTER * n for n in (14, 16, 18)]
    talks = [engine.conversation() for _ in texts]
    alone = [roomy.conversation() for _ in texts]
    for _ in range(2):
        for talk, other, text in zip(talks, alone, texts, strict=True):
            found, wanted = talk.chat(text, **GREEDY), other.chat(text, **GREEDY)
            assert len(found.token_ids) == len(wanted.token_ids)


def test_requests_beside_a_compaction(load: LoadEngine) -> None:
    """Others decode while a conversation is compacted; their tokens do not change."""
    engine = load("tiered")
    prompt = list(range(3, 40))
    alone = engine.generate(prompt, **{**GREEDY, "max_tokens": 200}).token_ids
    with engine.conversation() as talk:
        runs = [engine.submit(prompt, **{**GREEDY, "max_tokens": 200}) for _ in range(3)]
        for _ in range(4):
            talk.chat(CHATTER * 8, **GREEDY)
        for run in runs:
            assert run.result().token_ids == alone


def test_conversations_from_several_threads(load: LoadEngine) -> None:
    engine = load("tiered")
    answers: dict[int, list[list[int]]] = {}

    def talk_about(n: int) -> None:
        with engine.conversation() as talk:
            answers[n] = [talk.chat(CHATTER * (4 + n % 2), **GREEDY).token_ids for _ in range(4)]

    threads = [threading.Thread(target=talk_about, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert answers[0][0] == answers[2][0]
    assert answers[1][0] == answers[3][0]


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize(("kv", "tolerance"), [("q8_0", 0.02), ("q4_0", 0.3)])
def test_rounded_caches_are_near(
    load: LoadEngine, kv: KvKind, attention: str, tolerance: float
) -> None:
    """Log-probabilities of a continuation behind a rounded context.

    8 bits round a value to 1/256 of its block's largest, 4 bits to 1/16; the tiny model's logits
    are of order 1, so the differences stay below these.
    """
    prompt = [int(t) for t in np.random.default_rng(3).integers(3, 250, 700)]
    params = {**GREEDY, "logprobs": 0}

    def logprobs(engine: Engine) -> list[float]:
        found = engine.generate(prompt, **params).logprobs
        assert found is not None
        return [token.logprob for token in found[:1]]

    found = logprobs(load(kv, attention=attention))
    np.testing.assert_allclose(found, logprobs(load()), atol=tolerance)


@pytest.mark.parametrize("attention", ["fused", "reference"])
@pytest.mark.parametrize("kv", ["f16", "tiered"])
def test_saved_and_loaded(load: LoadEngine, tmp_path: Path, kv: KvKind, attention: str) -> None:
    """What is loaded goes on as what was saved, in another engine, and computes nothing again."""
    path = tmp_path / "talk.mbconv"
    engine = load(kv, attention=attention)
    other = load(kv, attention=attention, prefix_cache="off")
    with engine.conversation() as talk, other.conversation() as again:
        for _ in range(5):
            talk.chat(CHATTER * 8, **GREEDY)
        talk.save(path)
        again.restore(path)
        assert (again.messages, again.token_ids) == (talk.messages, talk.token_ids)
        wanted, found = talk.chat("and?", **GREEDY), again.chat("and?", **GREEDY)
        assert found.token_ids == wanted.token_ids
        assert found.usage.cached_tokens == wanted.usage.cached_tokens
        if kv == "tiered":
            assert found.context is not None and wanted.context is not None
            assert found.context.tokens == wanted.context.tokens
            assert found.context.n_bytes == wanted.context.n_bytes


@pytest.mark.parametrize("kv", ["f16", "tiered"])
def test_forks_go_on_each_by_itself(load: LoadEngine, kv: KvKind) -> None:
    engine = load(kv)
    with engine.conversation() as talk:
        for _ in range(4):
            talk.chat(CHATTER * 6, **GREEDY)
        with talk.fork() as twin:
            assert twin.messages == talk.messages
            answer = talk.chat("and the cat?", **GREEDY)
            assert twin.chat("and the cat?", **GREEDY).token_ids == answer.token_ids
            twin.chat("and the dog?", **GREEDY)
            assert len(twin.messages) == len(talk.messages) + 2
        again = talk.chat("more", **GREEDY)
        assert again.usage.cached_tokens >= len(talk.token_ids) - len(again.token_ids) - 40
        with pytest.raises(CancelledError):
            twin.chat("closed", **GREEDY)
