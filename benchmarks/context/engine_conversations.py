"""The engine's conversations: graded, and compacted after each turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from benchmarks.context.chat_tokens import WrittenTurns
from benchmarks.context.engine_systems import DetailHeads, last_logits
from modularbase import Engine
from modularbase.context.plan import ContextGrader
from modularbase.context_types import ContextOptions
from modularbase.conversation import Conversation
from modularbase.conversation_host import Host, Turn
from modularbase.errors import ContextBudgetError
from modularbase.types import FloatArray, KvKind, Result, SamplingParams

_MARGIN = 1.02  # of budgets that were too small: text comes in whole spans


@dataclass(frozen=True)
class TalkKeeping:
    """How a conversation is kept.

    Attributes:
        name: As tables have it.
        options: Without the budget; None: the engine has no tiers.
        ratio: The part of its bytes in F16 that is its budget, or the least that its floors allow;
            0: it has none.
        kv: Of the engine.
        detail_heads: Of the engine; None takes the catalogue's.
    """

    name: str
    options: ContextOptions | None = None
    ratio: float = 0
    kv: KvKind = "tiered"
    detail_heads: DetailHeads | None = None


# Of the 15 in SmolLM2-135M's catalogue entry; the part `detail_heads`, on other documents, has all
# but those of layer 14 among its best ten.
TEN_HEADS: DetailHeads = (
    (7, 2), (8, 0), (14, 0), (14, 1), (17, 1), (18, 2), (20, 1), (20, 2), (23, 0), (23, 2),
)  # fmt: skip

TALK_KEEPINGS = (
    TalkKeeping("ours, F16", kv="f16"),
    TalkKeeping("ours, budget of a quarter", ContextOptions(), 4),
    TalkKeeping(
        "ours, least budget, 24:1, ten detail heads",
        ContextOptions(slots_ratio=24),
        10,
        detail_heads=TEN_HEADS,
    ),
)
"""Exact first."""


class CountingTalk:
    """A conversation that tells when its last answer ended and what compactions took.

    Attributes:
        conversation: It.
        reply: Tokens that stand for what the base would answer; None: what it answers.
        answered_at: End of the last answer, by the monotonic clock.
        compaction_us: Work of each compaction.
    """

    def __init__(self, engine: Engine, options: ContextOptions | None) -> None:
        """Begins one."""
        self._host = engine._host
        self.reply: Sequence[int] | None = None
        self.answered_at = 0.0
        self.compaction_us = list[float]()
        runtime = cast(Any, _CountingRuntime(self._host.runtime, self.compaction_us))
        host = replace(self._host, submit=cast(Any, self._submit), runtime=runtime)
        self.conversation = Conversation(host, options, None)

    def _submit(self, turn: Turn) -> _Answered:
        """Reads the message and the reply; the token that the base adds to one is forgotten."""
        if self.reply is not None:
            ids, params = [*turn.token_ids, *self.reply], replace(turn.params, max_tokens=1)
            turn = replace(turn, token_ids=ids, params=params)
        given = self._host.submit(turn).result()
        self.answered_at = time.monotonic()
        if self.reply is not None:
            given = replace(given, token_ids=list(self.reply))
        return _Answered(given)


@dataclass(frozen=True)
class _Answered:
    """Stands for a generation that has ended."""

    given: Result

    def result(self) -> Result:
        return self.given


class _CountingRuntime:
    """An engine's runtime that takes note of what compactions cost."""

    def __init__(self, runtime: Any, work_us: list[float]) -> None:
        self._runtime, self._work_us = runtime, work_us

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def compact(self, *arguments: Any) -> Any:
        report = self._runtime.compact(*arguments)
        self._work_us.append(report.work_us)
        return report


class ConversationSystem:
    """An engine that keeps dialogues as conversations; see DialogueSystem."""

    def __init__(self, engine: Engine, head: FloatArray, keeping: TalkKeeping) -> None:
        """Several systems may share an engine.

        Args:
            engine: The engine.
            head: Of the base, [n_vocab, n_embd].
            keeping: How conversations are kept.
        """
        self.engine, self.head, self.keeping = engine, head, keeping
        self.name = keeping.name

    def hold_turns(self, written: WrittenTurns) -> TalkedDialogue:
        """See DialogueSystem."""
        options = fitting_options(self.engine, self.keeping, written)
        talk = CountingTalk(self.engine, options)
        for turn in written.turns:
            talk.reply = written.writer.reply(turn)
            talk_on(talk.conversation, turn.user, SamplingParams(max_tokens=1, temperature=0.0))
        talk.reply = None  # what is asked behind them the base answers itself
        if talk.conversation.token_ids != written.ids:
            raise RuntimeError("conversation: expected the script's tokens, found others")
        return TalkedDialogue(self, talk.conversation)


class TalkedDialogue:
    """A conversation behind which the engine goes on; see HeldDialogue."""

    def __init__(self, system: ConversationSystem, conversation: Conversation) -> None:
        """Takes a conversation over."""
        self._system, self._conversation = system, conversation
        state = system.engine._core.context_state(conversation._open_id())
        self.n_bytes: int = state.total_bytes

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """See HeldDialogue."""
        talk, system = self._conversation, self._system
        return last_logits(system.engine, system.head, talk._open_id(), talk.token_ids, ids)

    def answer(self, question: str, max_tokens: int) -> list[int]:
        """Asks a copy of the conversation; see HeldDialogue."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        with self._conversation.fork() as talk:
            return list(talk_on(talk, question, params).token_ids)

    def close(self) -> None:
        """See HeldDialogue."""
        self._conversation.close()


def fitting_options(
    engine: Engine, keeping: TalkKeeping, written: WrittenTurns
) -> ContextOptions | None:
    """Options with the budget that a way to keep turns gives them."""
    options, host = keeping.options, engine._host
    if options is None or keeping.ratio == 0:
        return options
    wanted = round(len(written.ids) * host.costs.key_token_bytes / keeping.ratio)
    least = round(least_bytes(written, host, options) * _MARGIN)
    return replace(options, budget_bytes=max(wanted, least))


def least_bytes(written: WrittenTurns, host: Host, options: ContextOptions) -> int:
    """What turns take at least, whatever is summarised of them."""
    try:
        ContextGrader().plan(written.chat, None, host.costs, replace(options, budget_bytes=1))
    except ContextBudgetError as error:
        return error.needed_bytes
    raise RuntimeError("budget: expected no context that fits into a byte")


def talk_on(talk: Conversation, message: str, params: SamplingParams) -> Result:
    """A turn; where too many spans may not be summarised, in a larger budget."""
    try:
        return talk.chat(message, params)
    except ContextBudgetError as error:
        assert talk._options is not None
        larger = round(error.needed_bytes * _MARGIN)
        talk._options = replace(talk._options, budget_bytes=larger)
    return talk_on(talk, message, params)
