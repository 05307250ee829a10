"""From a conversation to the tier of each of its tokens: what the engine asks for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from modularbase.context.budget import TARGET_SHARE, Account, GradedSpan, fit_budget
from modularbase.context.chat import Chat, Sectioned
from modularbase.context.costs import TierCosts
from modularbase.context.floors import Floor, floored_spans, spans_of
from modularbase.context.forgetting import TokenRanges, position_after
from modularbase.context.hysteresis import Hysteresis
from modularbase.context.scores import USER_BONUS, Scores, SpanSignals, score_spans
from modularbase.context.spans import Span
from modularbase.context_types import ContextOptions, ContextReport, Tier, TierDecision
from modularbase.errors import InvalidRequestError

TIER_CODES = {tier: code for code, tier in enumerate(Tier)}


@dataclass(frozen=True, slots=True)
class SlotSpan:
    """Tokens that slots stand for.

    Attributes:
        start: Position of the first.
        n_tokens: How many.
        n_slots: Slots for them, in each head of each layer.
        is_new: Whether they are still to be fitted.
    """

    start: int
    n_tokens: int
    n_slots: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class TierPlan:
    """How a conversation is to be kept.

    Attributes:
        tiers: A code of `TIER_CODES` for each token: what it is kept as once it has left the
            window. Tokens that are redundant but in no slot span stay important for now.
        slot_spans: What slots stand for, in order.
        report: The same for people, with bytes and reasons.
    """

    tiers: bytes
    slot_spans: tuple[SlotSpan, ...]
    report: ContextReport

    @property
    def new_slots(self) -> list[tuple[int, int, int]]:
        """First position, tokens and slots of what is still to be fitted."""
        return [(s.start, s.n_tokens, s.n_slots) for s in self.slot_spans if s.is_new]


@dataclass(frozen=True, slots=True)
class GraderState:
    """What a grader remembers of its conversation, but for scores that were low of late."""

    summarised: dict[int, str]
    refused: tuple[int, ...]


class ContextGrader:
    """Grades one conversation, check after check; it remembers what was summarised."""

    def __init__(self) -> None:
        """Begins with nothing summarised."""
        self._hysteresis = Hysteresis()
        self._summarised: dict[int, str] = {}  # reason by first position
        self._refused: set[int] = set()
        self._unfilled_bytes = 0

    def undecided(
        self, chat: Sectioned, costs: TierCosts, options: ContextOptions
    ) -> frozenset[int]:
        """First positions of the spans whose scores `plan` needs now; nobody else needs signals.

        These are the spans without a floor, behind the window, that are not summarised; none as
        long as so little of the budget is used that none of them is about to be.

        Args and errors as of `plan`.
        """
        graded, account = self._appraise(chat, costs, options)
        budget = options.budget_bytes
        if budget == 0 or account.used_bytes(graded) < TARGET_SHARE * budget:
            return frozenset()
        return frozenset(g.span.start for g in graded if account.is_undecided(g))

    def plan(
        self,
        chat: Sectioned,
        signals: SpanSignals | None,
        costs: TierCosts,
        options: ContextOptions,
    ) -> TierPlan:
        """Decides the tier of every token; `accept` what was carried out.

        Args:
            chat: The conversation, or a prompt alone.
            signals: What the model shows of its spans (`spans_of`), or None: then this is not one
                of the checks in a row that a span's score must be low in.
            costs: What tokens take.
            options: Budget, window and thresholds.

        Raises:
            ContextBudgetError: The budget is too small for what must be kept.
            InvalidRequestError: An option makes no sense, or the signals are not one a span.
        """
        graded, account = self._appraise(chat, costs, options)
        spans = [g.span for g in graded]
        candidates = np.array([account.is_undecided(g) for g in graded], dtype=np.bool_)
        scores = score_spans(signals or SpanSignals(), candidates)
        scores += [USER_BONUS if span.role == "user" else 0.0 for span in spans]
        is_check = signals is not None
        settled = self._settled(spans, scores, options) if is_check else frozenset()
        for span, score in zip(graded, scores, strict=True):
            span.score = 0.0 if math.isnan(score) else float(score)
            if span.tier is Tier.REDUNDANT and not span.is_summarised and account.is_out(span.span):
                span.summarise(span.reason)
        fit_budget(graded, settled, account, options)
        return TierPlan(
            tiers=b"".join(bytes([TIER_CODES[g.tier]]) * g.span.n_tokens for g in graded),
            slot_spans=tuple(
                SlotSpan(
                    g.span.start,
                    g.span.n_tokens,
                    account.n_slots(g.span),
                    is_new=g.span.start not in self._summarised,
                )
                for g in graded
                if g.is_summarised
            ),
            report=_report(graded, account),
        )

    @property
    def state(self) -> GraderState:
        """What `restore` takes."""
        return GraderState(dict(self._summarised), tuple(sorted(self._refused)))

    def restore(self, state: GraderState) -> None:
        """Goes on from where another grader of the same conversation was."""
        self._summarised, self._refused = dict(state.summarised), set(state.refused)

    def accept(
        self, plan: TierPlan, refused: Collection[int] = (), unfilled_bytes: int = 0
    ) -> None:
        """Takes note that a plan was carried out.

        Args:
            plan: Made by this grader.
            refused: First positions of new slot spans that no slots could stand for without harm;
                they stay important for good.
            unfilled_bytes: What memory takes now beyond what tokens cost, as blocks are not full:
                later plans leave room for as much.
        """
        self._unfilled_bytes = unfilled_bytes
        reasons = {decision.start: decision.reason for decision in plan.report.decisions}
        for slots in plan.slot_spans:
            if slots.start in refused:
                self._refused.add(slots.start)
            elif slots.is_new:
                self._summarised[slots.start] = reasons[slots.start]

    def spans_to_rehydrate(
        self, chat: Chat, similarity: Scores, options: ContextOptions
    ) -> list[Span]:
        """The summarised spans that the newest message resembles, as many as are to be read again.

        Args:
            chat: The conversation.
            similarity: Cosine of each span (`spans_of`) to the newest message; NaN is unknown.
            options: How similar they must be, and how many tokens they may have together.

        Returns:
            The most similar first.

        Raises:
            InvalidRequestError: There are not as many similarities as spans.
        """
        spans = spans_of(chat.sections)
        if np.shape(similarity) != (len(spans),):
            expected = f"one value for each of {len(spans)} spans"
            raise InvalidRequestError("similarity", expected, str(np.shape(similarity)))
        found = [
            (float(value), span)
            for value, span in zip(similarity, spans, strict=True)
            if span.start in self._summarised and value > options.rehydrate_above
        ]
        chosen: list[Span] = []
        n_left = options.rehydrate_tokens
        for _, span in sorted(found, key=lambda pair: (-pair[0], pair[1].start)):
            if span.n_tokens <= n_left:
                chosen.append(span)
                n_left -= span.n_tokens
        return chosen

    def still_summarised(self, starts: Collection[int]) -> None:
        """Takes note of what is left of the summaries: other spans were read again.

        Args:
            starts: First positions of the spans that slots stand for.
        """
        self._summarised = {
            start: reason for start, reason in self._summarised.items() if start in starts
        }

    @property
    def summarised(self) -> frozenset[int]:
        """First positions of the spans that are kept as a summary."""
        return frozenset(self._summarised)

    def forget(self, ranges: TokenRanges) -> None:
        """Takes note that tokens were taken out of the conversation; scores begin anew."""
        moved = {start: position_after(start, ranges) for start in self._summarised}
        self._summarised = {
            to: self._summarised[start] for start, to in moved.items() if to is not None
        }
        refused = (position_after(start, ranges) for start in self._refused)
        self._refused = {start for start in refused if start is not None}
        self._hysteresis = Hysteresis()

    def _appraise(
        self, chat: Sectioned, costs: TierCosts, options: ContextOptions
    ) -> tuple[list[GradedSpan], Account]:
        _check(options)
        account = Account(costs, options, len(chat.token_ids), self._unfilled_bytes)
        return [self._graded(s, f) for s, f in floored_spans(chat.sections)], account

    def _graded(self, span: Span, floor: Floor | None) -> GradedSpan:
        tier = floor.tier if floor else Tier.IMPORTANT
        reason = floor.reason if floor else "no floor"
        is_summarised = span.start in self._summarised
        is_refused = span.start in self._refused
        if is_summarised:
            tier, reason = Tier.REDUNDANT, self._summarised[span.start]
        elif is_refused:
            tier, reason = Tier.IMPORTANT, "no summary of it was good enough"
        return GradedSpan(span, floor, tier, is_summarised, not is_refused, 0.0, reason)

    def _settled(
        self, spans: Sequence[Span], scores: Scores, options: ContextOptions
    ) -> frozenset[int]:
        known = {
            span.start: float(score)
            for span, score in zip(spans, scores, strict=True)
            if not math.isnan(score)
        }
        return self._hysteresis.check(known, options.demote_below, options.demote_after_checks)


def _check(options: ContextOptions) -> None:
    for name, least in (
        ("budget_bytes", 0),
        ("window_tokens", 0),
        ("slots_ratio", 1),
        ("rehydrate_tokens", 0),
        ("demote_after_checks", 1),
    ):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidRequestError(name, f"a whole number, at least {least}", repr(value))
    for name in ("demote_below", "rehydrate_above"):
        value = getattr(options, name)
        if not isinstance(value, (int, float)) or math.isnan(value):
            raise InvalidRequestError(name, "a number", repr(value))


def _report(spans: Sequence[GradedSpan], account: Account) -> ContextReport:
    tokens: Counter[Tier] = Counter()
    n_bytes: Counter[Tier] = Counter()
    for tier in Tier:
        kept = [g for g in spans if account.kept_tier(g) is tier]
        tokens[tier] = sum(account.n_before_window(g.span) for g in kept)
        n_bytes[tier] = math.ceil(sum(map(account.past_bytes, kept)))
    n_tokens = sum(g.span.n_tokens for g in spans)
    return ContextReport(
        tokens=dict(tokens),
        n_bytes=dict(n_bytes),
        window_tokens=n_tokens - sum(tokens.values()),
        window_bytes=account.window_bytes(spans),
        exact_bytes=account.exact_bytes(n_tokens),
        decisions=tuple(
            TierDecision(
                start=g.span.start,
                n_tokens=g.span.n_tokens,
                role=g.span.role,
                text=g.span.text,
                tier=g.tier,
                floor=g.floor.tier if g.floor else None,
                reason=g.reason,
                demoted_from=g.demoted_from,
            )
            for g in spans
        ),
    )
