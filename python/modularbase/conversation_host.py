"""An engine as far as its conversations see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.identity import BaseIdentity
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.costs import TierCosts
from modularbase.context.plan import TIER_CODES, ContextGrader, TierPlan
from modularbase.context_types import ContextOptions, ContextReport, Tier
from modularbase.conversation_file import Layout
from modularbase.generation import Generation
from modularbase.types import Packs, SamplingParams


class State(Protocol):
    """What the runtime keeps of a conversation, and where."""

    @property
    def n_tokens(self) -> int:
        """Tokens whose keys and values are there."""

    @property
    def n_compacted(self) -> int:
        """Of these, the ones that lie in tiers."""

    @property
    def tiers(self) -> bytes:
        """A code for each of them."""

    @property
    def spans(self) -> Sequence[tuple[int, int, int]]:
        """Summarised tokens: first position, how many, slots."""

    @property
    def key_bytes(self) -> int:
        """What they take, by tier."""

    @property
    def important_bytes(self) -> int:
        """The same."""

    @property
    def redundant_bytes(self) -> int:
        """The same."""

    @property
    def own_bytes(self) -> int:
        """What the others take."""

    @property
    def total_bytes(self) -> int:
        """What all take."""


class Runtime(Protocol):
    """The part of the runtime that keeps conversations."""

    def open_conversation(self) -> int:
        """A new one."""

    def fork_conversation(self, id: int) -> int:
        """A second one that goes on from the same."""

    def close_conversation(self, id: int) -> None:
        """Forgets it."""

    def context_state(self, id: int) -> State:
        """What it keeps."""

    def attention_received(
        self, id: int, spans: Sequence[tuple[int, int]], layer: int
    ) -> Sequence[float]:
        """Mean share of attention of a token of each span."""

    def expected_attention(
        self, id: int, spans: Sequence[tuple[int, int]], layer: int
    ) -> Sequence[float]:
        """The same of queries to come, times the length of the values."""

    def save_conversation(self, id: int) -> Any:
        """An image of it."""

    def load_conversation(self, image: Any) -> int:
        """A new one, made of an image."""

    def forget(self, id: int, ranges: Sequence[tuple[int, int]]) -> Any:
        """Takes ranges out of its tokens."""

    def compact(
        self, id: int, tiers: bytes, spans: Sequence[tuple[int, int, int]], max_error: float
    ) -> Any:
        """Carries out a plan."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What an engine is asked in a turn.

    Attributes:
        token_ids: All tokens of the conversation so far.
        tiers: A code for each of the first tokens.
        rehydrate: Where summarised spans start that are to be computed again.
        conversation: Which one it is.
        params: How tokens are chosen.
        packs: As in `Engine.submit`.
    """

    token_ids: Sequence[int]
    tiers: bytes
    rehydrate: Sequence[int]
    conversation: int
    params: SamplingParams
    packs: Packs


@dataclass(frozen=True, slots=True)
class Host:
    """The engine that conversations are kept by, as far as they see it.

    Attributes:
        runtime: What keeps them.
        submit: Queues a turn.
        make_image: Makes what `Runtime.load_conversation` takes, of the fields of `Kept` and bytes.
        template: The base's.
        tokenizer: The base's.
        base: Which base it is.
        costs: What its tokens take.
        layout: Which bytes its blocks have.
        n_ctx: The longest sequence, in tokens.
    """

    runtime: Runtime
    submit: Callable[[Turn], Generation]
    make_image: Callable[..., Any]
    template: ChatTemplate
    tokenizer: Tokenizer
    base: BaseIdentity
    costs: TierCosts
    layout: Layout
    n_ctx: int


def kept_report(planned: ContextReport, state: State) -> ContextReport:
    """What was planned, with what is there instead of what was expected."""
    codes = {code: tier for tier, code in TIER_CODES.items()}
    tokens = dict.fromkeys(Tier, 0)
    for code in state.tiers:
        tokens[codes[code]] += 1
    return replace(
        planned,
        tokens=tokens,
        n_bytes={
            Tier.KEY: state.key_bytes,
            Tier.IMPORTANT: state.important_bytes,
            Tier.REDUNDANT: state.redundant_bytes,
        },
        window_tokens=state.n_tokens - state.n_compacted,
        window_bytes=state.own_bytes,
    )


def carry_out(
    runtime: Runtime,
    conversation: int,
    plan: TierPlan,
    grader: ContextGrader,
    costs: TierCosts,
    options: ContextOptions,
    n_past: int,
) -> bool:
    """Compacts a conversation's first n_past tokens by a plan; the grader takes note.

    Returns:
        Whether it was done; else nothing has changed.
    """
    done = runtime.compact(conversation, plan.tiers[:n_past], plan.new_slots, options.max_fit_error)
    if done.outcome.name != "done":
        return False
    refused = {start for start, _, _ in done.refused}
    state = runtime.context_state(conversation)
    grader.accept(plan, refused, _unfilled_bytes(state, costs, options.window_tokens))
    return True


def _unfilled_bytes(state: State, costs: TierCosts, window_tokens: int) -> int:
    """What a conversation takes beyond what its tokens cost, since blocks are seldom full.

    What lies behind the window though no tier has it yet counts as important.
    """
    n_own = state.n_tokens - state.n_compacted
    n_key = state.tiers.count(TIER_CODES[Tier.KEY]) + min(n_own, window_tokens)
    n_important = state.tiers.count(TIER_CODES[Tier.IMPORTANT]) + max(0, n_own - window_tokens)
    filled = n_key * costs.key_token_bytes + n_important * costs.important_token_bytes
    filled += sum(costs.summary_bytes(n_tokens, n_slots) for _, n_tokens, n_slots in state.spans)
    return max(0, state.total_bytes - math.ceil(filled))
