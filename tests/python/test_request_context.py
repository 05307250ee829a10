"""Single requests whose context is kept in tiers: what is kept, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from modularbase import AsyncEngine, ContextOptions, Engine, Tier, _core
from modularbase.context_types import ContextReport
from modularbase.errors import CancelledError, ContextBudgetError, InvalidRequestError
from modularbase.types import Message, Result
from tests.python.conftest import LoadEngine
from tests.tools.tiny_requests import ids

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 2000}
CHATTER = "so many words about the weather and the garden and the long way home today. "
DEFAULTS = ContextOptions()
ANY_FIT = ContextOptions(max_fit_error=1.0)  # a random model attends to everything alike


@pytest.fixture
def open_conversations(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The conversations that are open; all must be closed in the end."""
    opened: set[int] = set()
    real_open, real_close = _core.Engine.open_conversation, _core.Engine.close_conversation

    def open_one(engine: _core.Engine) -> int:
        opened.add(number := real_open(engine))
        return number

    def close_one(engine: _core.Engine, number: int) -> None:
        real_close(engine, number)
        opened.remove(number)

    monkeypatch.setattr(_core.Engine, "open_conversation", open_one)
    monkeypatch.setattr(_core.Engine, "close_conversation", close_one)
    yield opened
    assert not opened


@pytest.fixture
def tiered(load: LoadEngine, open_conversations: set[int]) -> Engine:
    """An engine that keeps tiers."""
    return load("tiered")


def dialogue(tier: str | None = None) -> list[Message]:
    """Some 1,700 tokens; the first message is of a tier, a rule is in the third."""
    first: Message = {"role": "user", "content": CHATTER * 16}
    return [
        first if tier is None else {**first, "tier": tier},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "Always answer in upper case."},
        {"role": "assistant", "content": CHATTER * 4},
        {"role": "user", "content": "What is a heap?"},
    ]


def context_of(result: Result) -> ContextReport:
    assert result.context is not None
    return result.context


def test_messages_are_graded_as_in_a_conversation(tiered: Engine) -> None:
    found = tiered.chat(dialogue(), context=DEFAULTS, **GREEDY)
    with tiered.conversation() as talk:
        wanted = talk.chat(dialogue(), **GREEDY)
    assert found.token_ids == wanted.token_ids
    report = context_of(found)
    n_prompt = found.usage.prompt_tokens
    assert report.total_tokens == n_prompt + len(found.token_ids) - 1  # the last is not computed
    assert report.decisions == tuple(d for d in context_of(wanted).decisions if d.start < n_prompt)
    rule = next(d for d in report.decisions if "upper case" in d.text)
    assert (rule.tier, rule.reason) == (Tier.KEY, "rule 'Always'")
    assert report.tokens[Tier.IMPORTANT] > 1000
    assert report.total_bytes < report.exact_bytes
    assert report.exact_bytes == report.total_tokens * tiered._tier_costs.key_token_bytes


def test_a_text_is_graded_like_a_users_message(tiered: Engine) -> None:
    text = f"{CHATTER * 10}\nNever say {'seven'!r}.\n{CHATTER * 10}"
    result = tiered.generate(text, context=DEFAULTS, **GREEDY)
    assert result.token_ids == tiered.generate(text, **GREEDY).token_ids
    report = context_of(result)
    assert "".join(d.text for d in report.decisions) == text
    (rule,) = (d for d in report.decisions if "seven" in d.text)
    assert rule.tier is Tier.KEY
    assert {d.floor for d in report.decisions if "Never" not in d.text} == {None, Tier.KEY}


def test_ids_have_no_floors(tiered: Engine) -> None:
    report = context_of(tiered.generate(ids(700), context=DEFAULTS, **GREEDY))
    assert [d.n_tokens for d in report.decisions] == [16, *[64] * 10, 44]
    assert [d.floor for d in report.decisions] == [Tier.KEY, *[None] * 11]
    assert report.tokens[Tier.KEY] == 16 and report.tokens[Tier.IMPORTANT] > 300


def test_a_short_prompt_lies_in_the_window(tiered: Engine) -> None:
    report = context_of(tiered.generate("hello", context=DEFAULTS, **GREEDY))
    assert report.window_tokens == report.total_tokens == len("hello") + 11


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(tiered: Engine, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        tiered.generate(prompt, context=DEFAULTS)


def test_a_tier_in_a_message_is_enough(tiered: Engine) -> None:
    report = context_of(tiered.chat(dialogue("key"), **GREEDY))
    assert report.tokens[Tier.KEY] > 1000
    assert report.decisions[1].reason == "set by the caller"
    assert tiered.chat(dialogue(), **GREEDY).context is None


def test_what_a_caller_can_spare_is_summarised_before_the_answer(tiered: Engine) -> None:
    result = tiered.chat(dialogue("redundant"), context=ANY_FIT, logprobs=0, **GREEDY)
    report = context_of(result)
    assert report.tokens[Tier.REDUNDANT] > 1000
    assert report.decisions[1].reason == "set by the caller"
    assert len(result.token_ids) == 12
    exact = tiered.chat(dialogue("key"), logprobs=0, **GREEDY)
    assert result.logprobs is not None and exact.logprobs is not None
    assert result.logprobs[0].logprob != exact.logprobs[0].logprob  # it saw the summary
    assert result.usage.cached_tokens == result.usage.prompt_tokens - 1


def test_a_budget_is_kept(tiered: Engine) -> None:
    free = context_of(tiered.chat(dialogue(), context=DEFAULTS, **GREEDY))
    budget_bytes = int(0.6 * free.total_bytes)
    options = replace(ANY_FIT, budget_bytes=budget_bytes)
    report = context_of(tiered.chat(dialogue(), context=options, **GREEDY))
    assert report.tokens[Tier.REDUNDANT] > 0
    assert report.demoted and all("budget" in d.reason for d in report.demoted)
    assert all(d.demoted_from is Tier.IMPORTANT for d in report.demoted)
    # Blocks that are not full come on top, which are many in a context so small.
    assert report.total_bytes < 0.9 * free.total_bytes


def test_summaries_that_do_harm_are_not_made(tiered: Engine) -> None:
    """A random model's attention is on everything alike: other spans are tried, in vain."""
    free = context_of(tiered.chat(dialogue(), context=DEFAULTS, **GREEDY))
    options = ContextOptions(budget_bytes=int(0.6 * free.total_bytes), max_fit_error=1e-9)
    report = context_of(tiered.chat(dialogue(), context=options, **GREEDY))
    assert report.tokens[Tier.REDUNDANT] == 0 and not report.demoted
    refused = [d for d in report.decisions if "no summary" in d.reason]
    assert len(refused) >= 10 and {d.tier for d in refused} == {Tier.IMPORTANT}


def test_floors_above_the_budget_are_refused_at_once(
    tiered: Engine, open_conversations: set[int]
) -> None:
    messages = [{"role": "system", "content": CHATTER * 4}, *dialogue()]
    with pytest.raises(ContextBudgetError, match="system prompt"):
        tiered.submit_chat(messages, context=ContextOptions(budget_bytes=1000))
    with pytest.raises(InvalidRequestError, match="slots_ratio"):
        tiered.submit("hello", context=ContextOptions(slots_ratio=0))
    assert not open_conversations


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_what_may_be_refused_is_refused_at_once(tiered: Engine, tier: str) -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        tiered.submit_chat(dialogue(tier), temperature=-1.0)
    with pytest.raises(InvalidRequestError, match="no_such"):
        tiered.submit_chat(dialogue(tier), no_such=1)
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        tiered.submit_chat(dialogue(tier), logit_bias={10**6: 1.0})


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_streamed(tiered: Engine, tier: str) -> None:
    wanted = tiered.chat(dialogue(tier), **GREEDY)
    generation = tiered.submit_chat(dialogue(tier), **GREEDY)
    pieces = list(generation)
    assert "".join(piece.text for piece in pieces) == wanted.text
    assert [token for piece in pieces for token in piece.token_ids] == wanted.token_ids
    assert generation.result().context == wanted.context
    assert generation.result().context == wanted.context  # told again
    text = CHATTER * 10
    found = "".join(tiered.stream(text, context=DEFAULTS, **GREEDY))
    assert found == tiered.generate(text, **GREEDY).text


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_ended_by_a_stop_string(tiered: Engine, tier: str) -> None:
    whole = tiered.chat(dialogue(tier), **{**GREEDY, "max_tokens": 40}).text
    stop = whole[-2:]
    stopped = tiered.chat(dialogue(tier), stop=stop, **LONG)
    assert stopped.finish_reason == "stop" and stopped.text == whole[: whole.index(stop)]
    assert context_of(stopped).total_tokens >= stopped.usage.prompt_tokens


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_cancelled(tiered: Engine, tier: str, open_conversations: set[int]) -> None:
    for wait in (False, True):
        generation = tiered.submit_chat(dialogue(tier), **LONG)
        if wait:
            next(iter(generation))
        generation.cancel()
        with pytest.raises(CancelledError):
            generation.result()
        assert not open_conversations
    for _ in tiered.stream(CHATTER * 10, context=DEFAULTS, **LONG):
        break


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_abandoned(tiered: Engine, tier: str, open_conversations: set[int]) -> None:
    generation = tiered.submit_chat(dialogue(tier), **LONG)
    assert open_conversations
    del generation
    assert not open_conversations
    end = time.monotonic() + 10
    while tiered.stats["n_running"] + tiered.stats["n_waiting"] and time.monotonic() < end:
        time.sleep(0.01)
    assert tiered.stats["n_running"] + tiered.stats["n_waiting"] == 0


@pytest.mark.parametrize("tier", ["important", "redundant"])
def test_too_late(tiered: Engine, tier: str) -> None:
    result = tiered.chat(dialogue(tier), timeout_s=1e-6, **GREEDY)
    assert (result.finish_reason, result.token_ids) == ("deadline", [])
    assert result.context is not None


def test_the_engine_is_closed(load: LoadEngine) -> None:
    engine = load("tiered")
    done = engine.submit_chat(dialogue(), context=DEFAULTS, **GREEDY)
    while not done.finished():
        time.sleep(0.01)
    running = engine.submit_chat(dialogue("redundant"), **LONG)
    engine.close()
    assert len(done.result().token_ids) == 12  # but nobody knows its context any more
    assert done.result().context is None
    with pytest.raises(CancelledError):
        running.result()


def test_finished_without_waiting(tiered: Engine) -> None:
    """Who only asks whether it is finished sees that, too."""
    generation = tiered.submit_chat(dialogue("redundant"), **GREEDY)
    end = time.monotonic() + 10
    while not generation.finished():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(generation.result().token_ids) == 12


def test_side_by_side(tiered: Engine) -> None:
    alone = [tiered.chat(dialogue(t), **GREEDY).token_ids for t in ("redundant", "important")]
    runs = [tiered.submit_chat(dialogue(t), **GREEDY) for t in ("redundant", "important") * 3]
    assert [run.result().token_ids for run in runs] == alone * 3


def test_awaited(tiered: Engine, open_conversations: set[int]) -> None:
    wanted = tiered.chat(dialogue("redundant"), **GREEDY)

    async def ask() -> None:
        awaited = AsyncEngine(tiered)
        result = await awaited.chat(dialogue("redundant"), **GREEDY)
        assert (result.token_ids, result.context) == (wanted.token_ids, wanted.context)
        text = CHATTER * 10
        pieces = [p async for p in awaited.stream(text, context=DEFAULTS, **GREEDY)]
        result = await awaited.generate(text, context=DEFAULTS, **GREEDY)
        assert "".join(pieces) == result.text and result.context is not None
        with pytest.raises(InvalidRequestError):
            await awaited.chat([{"role": "user", "content": "hi", "tier": "low"}])
        task = asyncio.ensure_future(awaited.chat(dialogue("redundant"), **LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    end = time.monotonic() + 10
    while open_conversations and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("kv", ["f16", "q4_0"])
def test_an_engine_without_tiers(load: LoadEngine, kv: str) -> None:
    engine = load(kv)
    with pytest.raises(InvalidRequestError, match=f"tiered.*{kv}"):
        engine.generate("hello", context=DEFAULTS)
    with pytest.raises(InvalidRequestError, match=f"tiered.*{kv}"):
        engine.chat(dialogue(), context=DEFAULTS)
    with pytest.raises(InvalidRequestError, match="context"):
        next(engine.stream("hello", context=DEFAULTS))
    plain = engine.chat(dialogue(), **GREEDY)
    for tier in Tier:
        assert engine.chat(dialogue(tier.value), **GREEDY).token_ids == plain.token_ids
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.tier.*'low'"):
        engine.chat(dialogue("low"))
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.tier"):
        engine.chat_prompt(dialogue("low"))
