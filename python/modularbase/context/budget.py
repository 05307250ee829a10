"""Fits a graded conversation into a budget of bytes, by summarising what matters least."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from modularbase.context.costs import TierCosts
from modularbase.context.floors import Floor
from modularbase.context.spans import Span
from modularbase.context_types import ContextOptions, Tier
from modularbase.errors import ContextBudgetError

# Shares of the budget: demoting begins at the one and ends at the other, so that it is rare.
START_SHARE = 0.9
TARGET_SHARE = 0.7


@dataclass(slots=True)
class GradedSpan:
    """A span, its tier, and why.

    Attributes:
        span: The span.
        floor: Its floor, or None.
        tier: What it is kept as once it has left the window.
        is_summarised: Whether slots stand for it, or will once this plan is carried out.
        can_be_summarised: Whether that was not found to do harm.
        score: What the model shows of it; lower matters less.
        reason: Why it is of this tier.
        demoted_from: Its tier before this plan, or None where that has not changed.
    """

    span: Span
    floor: Floor | None
    tier: Tier
    is_summarised: bool
    can_be_summarised: bool
    score: float
    reason: str
    demoted_from: Tier | None = None

    def summarise(self, reason: str) -> None:
        """Gives it the lowest tier."""
        self.demoted_from = Tier.IMPORTANT
        self.tier, self.is_summarised, self.reason = Tier.REDUNDANT, True, reason


class Account:
    """What spans take, by tier and by cause."""

    def __init__(
        self, costs: TierCosts, options: ContextOptions, n_tokens: int, unfilled_bytes: int = 0
    ) -> None:
        """An account for a conversation of n_tokens; unfilled: what blocks take beyond tokens."""
        self._costs = costs
        self._ratio = options.slots_ratio
        self._unfilled_bytes = unfilled_bytes
        self.window_start = max(0, n_tokens - options.window_tokens)

    def is_out(self, span: Span) -> bool:
        """Whether a span has left the window entirely."""
        return span.end <= self.window_start

    def n_before_window(self, span: Span) -> int:
        """How many of its tokens have left the window."""
        return min(span.n_tokens, max(0, self.window_start - span.start))

    def n_slots(self, span: Span) -> int:
        """The slots of a span's summary."""
        return max(1, round(span.n_tokens / self._ratio))

    def exact_bytes(self, n_tokens: int) -> int:
        """Bytes of tokens that are kept exactly."""
        return n_tokens * self._costs.key_token_bytes

    def kept_tier(self, graded: GradedSpan) -> Tier:
        """The tier its tokens before the window have now."""
        if graded.tier is Tier.REDUNDANT and not graded.is_summarised:
            return Tier.IMPORTANT
        return graded.tier

    def past_bytes(self, graded: GradedSpan) -> float:
        """Bytes of its tokens before the window."""
        n_tokens = self.n_before_window(graded.span)
        tier = self.kept_tier(graded)
        if tier is Tier.KEY:
            return self.exact_bytes(n_tokens)
        if tier is Tier.IMPORTANT:
            return n_tokens * self._costs.important_token_bytes
        return self._costs.summary_bytes(graded.span.n_tokens, self.n_slots(graded.span))

    def window_bytes(self, spans: Iterable[GradedSpan]) -> int:
        """Bytes of the tokens in the window."""
        n_tokens = sum(g.span.n_tokens - self.n_before_window(g.span) for g in spans)
        return self.exact_bytes(n_tokens)

    def needed_bytes(self, spans: Sequence[GradedSpan]) -> int:
        """Bytes of all spans."""
        return math.ceil(sum(map(self.past_bytes, spans))) + self.window_bytes(spans)

    def used_bytes(self, spans: Sequence[GradedSpan]) -> int:
        """The same, with what is unfilled of the blocks that they lie in."""
        return self.needed_bytes(spans) + self._unfilled_bytes

    def is_undecided(self, graded: GradedSpan) -> bool:
        """Whether a score may decide about a span: nothing else has."""
        is_free = graded.floor is None and graded.can_be_summarised
        return is_free and not graded.is_summarised and self.is_out(graded.span)

    def saved_bytes(self, graded: GradedSpan) -> float:
        """What summarising a span saves; it may be less than nothing."""
        span = graded.span
        return self.past_bytes(graded) - self._costs.summary_bytes(
            span.n_tokens, self.n_slots(span)
        )

    def bytes_by_cause(self, spans: Sequence[GradedSpan]) -> dict[str, int]:
        """What needs the bytes that cannot be saved."""
        causes: Counter[str] = Counter()
        for graded in spans:
            causes[_cause(graded)] += math.ceil(self.past_bytes(graded))
        causes["window"] = self.window_bytes(spans)
        return {cause: n_bytes for cause, n_bytes in causes.most_common() if n_bytes}


def fit_budget(
    spans: Sequence[GradedSpan],
    settled: AbstractSet[int],
    account: Account,
    options: ContextOptions,
) -> None:
    """Summarises spans until the conversation fits; changes them.

    Demoting begins when START_SHARE of the budget is used. Spans in `settled` go first, those that
    lose the least score per byte saved before others, until TARGET_SHARE is used; the others only
    as far as the budget would be exceeded otherwise. What blocks leave unfilled counts as used, as
    far as there is something to summarise for it.

    Args:
        spans: The whole conversation.
        settled: First positions of the spans whose score has been low for long enough.
        account: What they take.
        options: The budget.

    Raises:
        ContextBudgetError: It does not fit whatever is summarised.
    """
    budget = options.budget_bytes
    used: float = account.used_bytes(spans)
    if budget == 0 or used < START_SHARE * budget:
        return
    candidates = [g for g in spans if account.is_undecided(g) and account.saved_bytes(g) > 0]
    lowest = min((g.score for g in candidates), default=0.0)
    # Scores may be negative, and then a ratio would prefer what saves less: so from the lowest on.
    candidates.sort(key=lambda g: ((g.score - lowest) / account.saved_bytes(g), g.span.start))
    for is_settled, limit in ((True, TARGET_SHARE * budget), (False, float(budget))):
        for graded in candidates:
            if used <= limit:
                break
            if (graded.span.start in settled) != is_settled:
                continue
            why = "its score is low" if is_settled else "the budget would be exceeded"
            used -= account.saved_bytes(graded)
            graded.summarise(f"no floor, score {graded.score:.2f}: {why}")
    if account.needed_bytes(spans) > budget:
        causes = account.bytes_by_cause(spans)
        raise ContextBudgetError(sum(causes.values()), budget, causes)


def _cause(graded: GradedSpan) -> str:
    if graded.is_summarised:
        return "summaries"
    return graded.floor.cause if graded.floor else "other text"
