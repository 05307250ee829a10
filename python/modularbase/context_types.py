"""How a context is kept, as callers ask for it and are told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Tier(str, Enum):
    """How a token of the context is kept: exactly, in about 4 bits, or as a part of a summary."""

    KEY = "key"
    IMPORTANT = "important"
    REDUNDANT = "redundant"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """How the context of a conversation, or of a single request, is graded.

    Attributes:
        budget_bytes: Memory for its keys and values; 0 is none: nothing is demoted to a summary but
            what the caller says is redundant.
        window_tokens: The last tokens, which are kept exactly whatever their tier.
        slots_ratio: Tokens that one slot of a summary stands for, about.
        demote_below: A span may be summarised when its score is below; 0 is the mean of the spans
            that may be.
        demote_after_checks: How often in a row it must be.
        max_fit_error: A summary is not made where it would change what attention gives by more, as
            a share of it.
        rehydrate_above: A summarised span is read again when it has a larger share of what the
            newest message says (`similarity_to_newest`).
        rehydrate_tokens: At most so many tokens a turn are read again, the most similar spans
            first.
    """

    budget_bytes: int = 0
    window_tokens: int = 128
    slots_ratio: int = 16
    demote_below: float = 0.0
    demote_after_checks: int = 2
    max_fit_error: float = 0.05
    rehydrate_above: float = 0.35
    rehydrate_tokens: int = 128


@dataclass(frozen=True, slots=True)
class TierDecision:
    """The tier of a span of the context, and why.

    Attributes:
        start: Position of its first token.
        n_tokens: Its length.
        role: Of the message it belongs to.
        text: What it says.
        tier: What it is kept as once it has left the window.
        floor: The lowest tier it may have, or None.
        reason: Why it is of this tier.
        demoted_from: Its tier before this plan, if that was a higher one; else None.
    """

    start: int
    n_tokens: int
    role: str
    text: str
    tier: Tier
    floor: Tier | None
    reason: str
    demoted_from: Tier | None = None


@dataclass(frozen=True, slots=True)
class ContextReport:
    """What a context takes, by tier.

    Attributes:
        tokens: By tier, of those before the window.
        n_bytes: By tier, of those before the window.
        window_tokens: Tokens in the window.
        window_bytes: What they take.
        exact_bytes: What all tokens would take if they were kept exactly.
        decisions: Span by span, in order; of a single request, those on its prompt.
        rehydrated_tokens: Summarised tokens that the last turn read again.
        forgotten_tokens: Tokens that went because the conversation had become too long for the
            base; they are counted nowhere else.
    """

    tokens: Mapping[Tier, int]
    n_bytes: Mapping[Tier, int]
    window_tokens: int
    window_bytes: int
    exact_bytes: int
    decisions: tuple[TierDecision, ...]
    rehydrated_tokens: int = 0
    forgotten_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """All tokens."""
        return sum(self.tokens.values()) + self.window_tokens

    @property
    def total_bytes(self) -> int:
        """What they take."""
        return sum(self.n_bytes.values()) + self.window_bytes

    @property
    def demoted(self) -> tuple[TierDecision, ...]:
        """The spans that this plan gave a lower tier."""
        return tuple(d for d in self.decisions if d.demoted_from is not None)
