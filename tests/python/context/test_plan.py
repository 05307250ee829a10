"""Plans: bytes add up, budgets hold or say why not, and what was done stays done."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.budget import Account, GradedSpan, fit_budget
from modularbase.context.chat import Chat
from modularbase.context.costs import TierCosts
from modularbase.context.floors import floored_spans, spans_of
from modularbase.context.plan import TIER_CODES, ContextGrader, TierPlan
from modularbase.context.scores import SpanSignals
from modularbase.context.spans import Span
from modularbase.context_types import ContextOptions, Tier
from modularbase.errors import BaseLoadError, ContextBudgetError, InvalidRequestError
from modularbase.types import Message
from tests.python.context.conftest import CHATML, ChatOf
from tests.tools.labelled_dialogues import make_dialogue

COSTS = TierCosts.of_shape(n_layer=30, n_head_kv=3, head_dim=64)
WORDS = ("sea", "sky", "town", "wood")
AT_ONCE = ContextOptions(demote_after_checks=1)


@pytest.fixture(scope="module")
def long_chat(tokenizer: Tokenizer) -> Chat:
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    chat.add_history(make_dialogue(11, n_turns=20, chat_share=0.9).messages)
    return chat


def checked(
    plan: TierPlan, chat: Chat, options: ContextOptions, costs: TierCosts = COSTS
) -> TierPlan:
    """The plan, if its parts agree with each other and with a count of our own."""
    n_tokens = len(chat.token_ids)
    report = plan.report
    assert len(plan.tiers) == n_tokens == report.total_tokens
    window_start = max(0, n_tokens - options.window_tokens)
    assert report.window_tokens == n_tokens - window_start
    in_slots = bytearray(n_tokens)
    for slots in plan.slot_spans:
        assert slots.start + slots.n_tokens <= window_start
        assert slots.n_slots == max(1, round(slots.n_tokens / options.slots_ratio))
        in_slots[slots.start : slots.start + slots.n_tokens] = b"\1" * slots.n_tokens
    n_bytes = report.window_tokens * costs.key_token_bytes
    n_bytes += sum(slots.n_slots for slots in plan.slot_spans) * costs.slot_bytes
    counts = dict.fromkeys(Tier, 0)
    for code, is_slot in zip(plan.tiers[:window_start], in_slots, strict=False):
        tier = Tier.IMPORTANT if code == 2 and not is_slot else list(Tier)[code]
        assert not is_slot or code == 2
        counts[tier] += 1
    n_bytes += counts[Tier.KEY] * costs.key_token_bytes
    assert dict(report.tokens) == counts
    expected = n_bytes + counts[Tier.IMPORTANT] * costs.important_token_bytes
    assert expected <= report.total_bytes < expected + 3  # each tier's bytes are rounded up
    assert report.exact_bytes == n_tokens * costs.key_token_bytes
    edge = 0
    for decision in report.decisions:
        assert decision.start == edge and decision.reason
        edge += decision.n_tokens
        assert set(plan.tiers[decision.start : edge]) == {TIER_CODES[decision.tier]}
    assert edge == n_tokens
    return plan


def plan_of(chat: Chat, options: ContextOptions, signals: SpanSignals | None = None) -> TierPlan:
    return checked(ContextGrader().plan(chat, signals, COSTS, options), chat, options)


def test_without_a_budget_nothing_is_summarised(long_chat: Chat) -> None:
    plan = plan_of(long_chat, ContextOptions())
    assert plan.slot_spans == () and set(plan.tiers) == {0, 1}
    assert plan.report.demoted == ()
    assert plan.report.total_bytes < plan.report.exact_bytes


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.05, 1.1),
    window=st.integers(0, 400),
    ratio=st.integers(1, 64),
)
def test_budgets_hold_or_are_refused(
    seed: int, share: float, window: int, ratio: int, tokenizer: Tokenizer
) -> None:
    chat = Chat(ChatTemplate(CHATML), tokenizer)
    chat.add_history(make_dialogue(seed, n_turns=6).messages)
    spans = spans_of(chat.sections)
    budget = int(share * len(chat.token_ids) * COSTS.key_token_bytes)
    options = ContextOptions(budget_bytes=budget, window_tokens=window, slots_ratio=ratio)
    rng = np.random.default_rng(seed)
    signals = SpanSignals(similarity=rng.normal(size=len(spans)))
    try:
        plan = plan_of(chat, options, signals)
    except ContextBudgetError as error:
        assert error.needed_bytes > error.budget_bytes == budget
        assert error.needed_bytes == sum(error.by_cause.values())
        # With the budget that it asks for, it goes.
        enough = replace(options, budget_bytes=error.needed_bytes)
        assert plan_of(chat, enough, signals).report.total_bytes <= error.needed_bytes
        return
    assert plan.report.total_bytes <= budget + 3
    assert plan == plan_of(chat, options, signals)
    for decision, (_, floor) in zip(
        plan.report.decisions, floored_spans(chat.sections), strict=True
    ):
        if floor is not None:
            assert decision.tier == floor.tier == decision.floor


def test_demoting_begins_late_and_goes_far(chat_of: ChatOf) -> None:
    answer = " ".join(f"The {word} was grey and quiet all day." for word in WORDS * 12)
    long_chat = chat_of([{"role": "assistant", "content": answer}] * 4)
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    # Scores that say that everything is worthless: hysteresis lets all of it go.
    options = replace(AT_ONCE, demote_below=5.0)
    unknown = SpanSignals()
    calm = plan_of(long_chat, replace(options, budget_bytes=int(free / 0.89)), unknown)
    assert calm.slot_spans == ()
    budget = int(free / 0.91)
    busy = plan_of(long_chat, replace(options, budget_bytes=budget), unknown)
    assert busy.report.demoted
    largest = max(d.n_tokens for d in busy.report.demoted) * COSTS.important_token_bytes
    assert 0.7 * budget - largest < busy.report.total_bytes <= 0.7 * budget


def test_the_least_score_per_byte_goes_first(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report
    spans = spans_of(long_chat.sections)
    scores = np.linspace(1, -1, len(spans))  # later ones matter less
    signals = SpanSignals(similarity=scores)
    options = replace(AT_ONCE, budget_bytes=int(free.total_bytes / 0.95))
    plan = plan_of(long_chat, options, signals)
    demoted = {d.start for d in plan.report.demoted}
    assert demoted
    kept = [
        (span, score)
        for (span, floor), score in zip(floored_spans(long_chat.sections), scores, strict=True)
        if floor is None and span.role == "assistant" and span.start not in demoted
    ]
    window_start = free.total_tokens - free.window_tokens
    gone = [s for s in spans if s.start in demoted]
    # Of two of one length, the one that matters less went, unless it is in the window.
    for one, (other, _) in itertools.product(gone, kept):
        if one.n_tokens == other.n_tokens and other.end <= window_start:
            assert one.start > other.start


def test_low_scores_do_not_favour_what_saves_little() -> None:
    lengths, scores = (200, 20, 200), (-0.9, -0.5, 1.0)
    spans: list[GradedSpan] = []
    for n_tokens, score in zip(lengths, scores, strict=True):
        start = sum(span.span.n_tokens for span in spans)
        span = Span(start, n_tokens, 0, "assistant", "prose", "x", None)
        spans.append(GradedSpan(span, None, Tier.IMPORTANT, False, True, score, "no floor"))
    options = ContextOptions(window_tokens=0, budget_bytes=int(300 * 6660.0))
    fit_budget(spans, frozenset(), Account(COSTS, options, sum(lengths)), options)
    # -0.5 / 20 is less than -0.9 / 200, but the short one's loss buys less.
    assert [span.is_summarised for span in spans] == [True, False, False]


def test_what_the_user_said_goes_last(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    plan = plan_of(long_chat, replace(AT_ONCE, budget_bytes=int(0.95 * free)))
    assert {d.role for d in plan.report.demoted} == {"assistant"}


def test_two_low_checks_are_needed(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    signals = SpanSignals(similarity=np.linspace(-1, 1, len(spans_of(long_chat.sections))))
    # Above the watermark, but within the budget: there is time.
    options = ContextOptions(budget_bytes=int(free / 0.95))
    grader = ContextGrader()
    first = grader.plan(long_chat, signals, COSTS, options)
    assert first.slot_spans == ()
    assert grader.plan(long_chat, None, COSTS, options).slot_spans == ()  # a look, not a check
    second = grader.plan(long_chat, signals, COSTS, options)
    assert second.report.total_bytes <= 0.9 * options.budget_bytes
    # Over the budget there is none.
    forced = plan_of(long_chat, ContextOptions(budget_bytes=int(0.97 * free)), signals)
    assert forced.slot_spans and "exceeded" in forced.report.demoted[0].reason


def test_only_undecided_spans_need_signals(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    grader = ContextGrader()
    assert not grader.undecided(long_chat, COSTS, AT_ONCE)
    assert not grader.undecided(long_chat, COSTS, replace(AT_ONCE, budget_bytes=2 * free))
    options = replace(AT_ONCE, budget_bytes=int(0.9 * free))
    spans = spans_of(long_chat.sections)
    values = np.random.default_rng(5).normal(size=len(spans))
    for _ in range(2):
        found = grader.undecided(long_chat, COSTS, options)
        known = [
            value if s.start in found else np.nan for s, value in zip(spans, values, strict=True)
        ]
        plan = grader.plan(long_chat, SpanSignals(similarity=np.array(known)), COSTS, options)
        assert plan == grader.plan(long_chat, SpanSignals(similarity=values), COSTS, options)
        refused, *done = [slots.start for slots in plan.slot_spans if slots.is_new]
        grader.accept(plan, refused=[refused])
        assert {refused, *done} <= found
        left = grader.undecided(long_chat, COSTS, replace(options, budget_bytes=free // 2))
        assert left == found - {refused, *done}
        options = replace(options, budget_bytes=int(0.8 * free))


def test_room_is_left_for_what_blocks_leave_unfilled(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    options = replace(AT_ONCE, budget_bytes=int(0.95 * free))
    grader, n_unfilled = ContextGrader(), free // 10
    plan = grader.plan(long_chat, None, COSTS, options)
    grader.accept(plan, unfilled_bytes=n_unfilled)
    again = checked(grader.plan(long_chat, None, COSTS, options), long_chat, options)
    assert plan.report.total_bytes > options.budget_bytes - n_unfilled
    assert again.report.total_bytes <= options.budget_bytes - n_unfilled
    # What cannot be spared is no error: the tokens themselves would fit.
    grader.accept(again, unfilled_bytes=free)
    last = checked(grader.plan(long_chat, None, COSTS, options), long_chat, options)
    grader.accept(last, unfilled_bytes=free)
    assert not grader.undecided(long_chat, COSTS, options)


def test_what_was_done_stays_done(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    options = replace(AT_ONCE, budget_bytes=int(0.95 * free))
    grader = ContextGrader()
    plan = grader.plan(long_chat, None, COSTS, options)
    assert grader.plan(long_chat, None, COSTS, options) == plan  # proposed, not done
    refused, *done = [slots.start for slots in plan.slot_spans]
    assert done
    grader.accept(plan, refused=[refused])
    again = checked(grader.plan(long_chat, None, COSTS, options), long_chat, options)
    assert {s.start for s in again.slot_spans if not s.is_new} == set(done)
    (decision,) = [d for d in again.report.decisions if d.start == refused]
    assert (decision.tier, decision.demoted_from) == (Tier.IMPORTANT, None)
    # Without a budget, too.
    later = grader.plan(long_chat, None, COSTS, AT_ONCE)
    assert {s.start for s in later.slot_spans} == set(done)


def test_rehydration(long_chat: Chat) -> None:
    free = plan_of(long_chat, AT_ONCE).report.total_bytes
    options = replace(AT_ONCE, budget_bytes=int(0.95 * free), rehydrate_above=0.5)
    grader = ContextGrader()
    plan = grader.plan(long_chat, None, COSTS, options)
    grader.accept(plan)
    spans = spans_of(long_chat.sections)
    starts = [slots.start for slots in plan.slot_spans]
    similarity = np.full(len(spans), 0.9)  # of spans that are not summarised it does not matter
    values = dict(
        zip(starts, itertools.chain((0.6, 0.8, np.nan, 0.5), itertools.repeat(0.1)), strict=False)
    )
    for i, span in enumerate(spans):
        similarity[i] = values.get(span.start, 0.9)
    found = grader.spans_to_rehydrate(long_chat, similarity, options)
    assert [span.start for span in found] == [starts[1], starts[0]]
    one_only = replace(options, rehydrate_tokens=found[0].n_tokens)
    assert grader.spans_to_rehydrate(long_chat, similarity, one_only) == found[:1]
    grader.still_summarised(set(starts) - {span.start for span in found})
    assert grader.spans_to_rehydrate(long_chat, similarity, options) == []
    again = grader.plan(long_chat, None, COSTS, AT_ONCE)
    assert {s.start for s in again.slot_spans} == set(starts) - {span.start for span in found}
    with pytest.raises(InvalidRequestError, match="similarity"):
        grader.spans_to_rehydrate(long_chat, similarity[:-1], options)


def test_the_callers_tiers(chat_of: ChatOf) -> None:
    chatter = "The sea was grey and quiet there, and the harbour was full of boats. " * 4
    messages: list[Message] = [
        {"role": "system", "content": "Be kind to everyone who asks, whatever they ask."},
        {"role": "user", "content": "You must never lie. " + chatter, "tier": "redundant"},
        {"role": "assistant", "content": chatter, "tier": "key"},
        {"role": "user", "content": chatter, "tier": "redundant"},
    ]
    chat = chat_of(messages)
    tiers = {
        d.role: d.tier
        for d in plan_of(chat, ContextOptions()).report.decisions
        if d.reason == "set by the caller"
    }
    assert tiers == {"user": Tier.REDUNDANT, "assistant": Tier.KEY}
    # Redundant is redundant without any budget, but not before it has left the window.
    everything = plan_of(chat, ContextOptions(window_tokens=0))
    of_users = [d for d in everything.report.decisions if d.tier is Tier.REDUNDANT]
    assert len(everything.slot_spans) == len(of_users) == len(everything.report.demoted)
    nothing = plan_of(chat, ContextOptions(window_tokens=10_000))
    assert nothing.slot_spans == () and 2 in nothing.tiers
    # They come back while they are asked for, and go again.
    grader, options = ContextGrader(), ContextOptions(window_tokens=0, rehydrate_tokens=1000)
    grader.accept(grader.plan(chat, None, COSTS, options))
    similarity = np.ones(len(spans_of(chat.sections)))
    found = grader.spans_to_rehydrate(chat, similarity, options)
    assert len(found) == len(of_users)
    grader.still_summarised(())
    again = grader.plan(chat, None, COSTS, options)
    assert {slots.start for slots in again.slot_spans} == {span.start for span in found}


def test_a_budget_below_the_floors_says_what_needs_it(chat_of: ChatOf) -> None:
    chat = chat_of(
        [
            {"role": "system", "content": "Be kind. " * 30},
            {"role": "user", "content": "You must never ever lie to anybody."},
            {"role": "tool", "content": "4711"},
            {"role": "assistant", "content": "The sea was grey. " * 30},
        ]
    )
    with pytest.raises(ContextBudgetError) as caught:
        ContextGrader().plan(chat, None, COSTS, ContextOptions(budget_bytes=1000, window_tokens=16))
    causes = caught.value.by_cause
    assert set(causes) == {
        "system prompt", "rules", "tool results", "template", "window", "summaries", "other text"
    }  # fmt: skip
    assert causes["window"] == 16 * COSTS.key_token_bytes
    assert f"system prompt {causes['system prompt']}" in str(caught.value)


def test_costs_of_a_base() -> None:
    # SmolLM2: 23040 bytes a token in F16; 4.625 of 16 bits of it; 8.5, and a weight for each head.
    assert TierCosts(23040, 6660.0, 12240 + 4 * 90) == COSTS
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.embedding_length": 576,
    }
    assert TierCosts.from_metadata("a.gguf", metadata) == COSTS
    wider = TierCosts.from_metadata("a.gguf", metadata | {"llama.attention.key_length": 128})
    assert wider.key_token_bytes == 2 * COSTS.key_token_bytes
    del metadata["llama.attention.head_count_kv"]
    assert TierCosts.from_metadata("a.gguf", metadata).key_token_bytes == 3 * 23040


@pytest.mark.parametrize("value", [None, 0, True, "30"])
def test_metadata_without_a_shape(value: object) -> None:
    with pytest.raises(BaseLoadError) as caught:
        TierCosts.from_metadata(
            "a.gguf",
            {
                "general.architecture": "llama",
                "llama.block_count": value,
                "llama.attention.head_count": 9,
                "llama.embedding_length": 576,
            },
        )
    assert (caught.value.file, caught.value.field) == ("a.gguf", "llama.block_count")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget_bytes", -1),
        ("budget_bytes", 1.5),
        ("window_tokens", -1),
        ("window_tokens", True),
        ("slots_ratio", 0),
        ("demote_after_checks", 0),
        ("demote_below", float("nan")),
        ("rehydrate_above", "high"),
    ],
)
def test_options_that_make_no_sense(field: str, value: object, long_chat: Chat) -> None:
    options = replace(ContextOptions(), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError) as caught:
        ContextGrader().plan(long_chat, None, COSTS, options)
    assert caught.value.field == field
