"""The context of a single request in tiers: a conversation of its own, which ends with it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from modularbase.context.chat import Sectioned
from modularbase.context.costs import TierCosts
from modularbase.context.floors import spans_of
from modularbase.context.plan import ContextGrader, TierPlan
from modularbase.context.scores import SpanSignals
from modularbase.context.similarity import similarity_to_newest
from modularbase.context_types import ContextOptions, ContextReport, Tier
from modularbase.conversation_host import Runtime, carry_out, kept_report
from modularbase.errors import CancelledError, ContextBudgetError
from modularbase.generation import Ticket

Submit = Callable[[], Ticket]

_WAIT_MS = 100


class RequestContext:
    """What a request's context is kept as, from its submission to its end.

    A request whose owner has gone is cancelled, and its context with it.

    Attributes:
        conversation: What the runtime calls the conversation.
        tiers: A code for each token of the prompt, as the runtime takes them.
    """

    def __init__(
        self, runtime: Runtime, costs: TierCosts, prompt: Sectioned, options: ContextOptions
    ) -> None:
        """Grades a prompt by its structure, its caller and what resembles its newest message.

        Raises:
            ContextBudgetError: The budget is too small for what must be kept.
            InvalidRequestError: An option makes no sense.
        """
        self._plan = PromptPlan(costs, prompt, options)
        self._runtime, self._costs = runtime, costs
        self._report: ContextReport | None = None
        self._lock = threading.Lock()  # guards the report
        self._tickets: list[Ticket] = []
        self.tiers = self._plan.tiers
        self.conversation = runtime.open_conversation()
        self._close = weakref.finalize(self, _close, runtime, self.conversation, self._tickets)
        self._close.atexit = False  # the engine's end is enough

    def submit(self, submit: Submit) -> Ticket:
        """Queues the request, behind a summary of its prompt where the plan has one.

        Args:
            submit: Queues the request as it is, each time it is called.
        """
        ticket = submit()
        if self._plan.has_new_slots:
            summarise = partial(self._plan.carry_out, self._runtime, self.conversation)
            ticket = SummaryFirst(ticket, submit, summarise)
        self._tickets.append(ticket)
        return ticket

    def settle(self) -> ContextReport | None:
        """Ends with the request, which is over, and tells what was kept of it; None: nobody knows.

        The decisions are those on the prompt; what was generated counts in tokens and bytes.
        """
        with self._lock:
            if self._close.alive:
                with contextlib.suppress(CancelledError):  # the engine is closed
                    self._report = self._kept()
                self._close()
            return self._report

    def _kept(self) -> ContextReport:
        state = self._runtime.context_state(self.conversation)
        if state.n_tokens == 0:  # others needed the memory since, or the request never ran
            return self._plan.report
        exact_bytes = state.n_tokens * self._costs.key_token_bytes
        return replace(kept_report(self._plan.report, state), exact_bytes=exact_bytes)


class PromptPlan:
    """How a prompt is to be kept, and what of that turned out to do harm."""

    def __init__(self, costs: TierCosts, prompt: Sectioned, options: ContextOptions) -> None:
        """Grades the prompt; errors as of `ContextGrader.plan`."""
        self._costs, self._prompt, self._options = costs, prompt, options
        self._similarity = similarity_to_newest(spans_of(prompt.sections))
        self._grader = ContextGrader()
        self._plan = self._graded(options)
        self._demoted = {decision.start for decision in self._plan.report.demoted}

    @property
    def tiers(self) -> bytes:
        """A code for each token."""
        return self._plan.tiers

    @property
    def has_new_slots(self) -> bool:
        """Whether something is still to be summarised."""
        return bool(self._plan.new_slots)

    @property
    def report(self) -> ContextReport:
        """What is planned."""
        decisions = [
            replace(d, demoted_from=Tier.IMPORTANT)
            if d.start in self._demoted and d.tier is Tier.REDUNDANT
            else d
            for d in self._plan.report.decisions
        ]
        return replace(self._plan.report, decisions=tuple(decisions))

    def carry_out(self, runtime: Runtime, conversation: int) -> None:
        """Summarises what has been read; where slots would do harm, something else instead."""
        # The last token is computed again: its output is the answer's first token.
        n_past = max(0, len(self.tiers) - max(1, self._options.window_tokens))
        while self.has_new_slots:
            if not carry_out(
                runtime, conversation, self._plan, self._grader, self._costs, self._options, n_past
            ):
                return
            self._plan = self._graded_again()
            self._demoted |= {decision.start for decision in self._plan.report.demoted}

    def _graded(self, options: ContextOptions) -> TierPlan:
        signals = SpanSignals(similarity=self._similarity)
        return self._grader.plan(self._prompt, signals, self._costs, options)

    def _graded_again(self) -> TierPlan:
        try:
            return self._graded(self._options)
        except ContextBudgetError:  # nothing else may go: it takes more than it was to take
            return self._graded(replace(self._options, budget_bytes=0))


class SummaryFirst:
    """Two runs of one request: the first reads the prompt for a summary, the second answers.

    The first is the request itself, so that what may be refused is refused before anything runs,
    and it ends with its first token. What comes between the runs is done by who waits.
    """

    def __init__(self, reading: Ticket, submit: Submit, summarise: Callable[[], None]) -> None:
        """Goes on from the first run."""
        self._ticket = reading
        self._submit, self._summarise = submit, summarise
        self._lock = threading.Lock()  # one goes from the first run to the second
        self._has_read = False
        self._is_cancelled = False

    def wait_tokens(self, n_seen: int, timeout_ms: int) -> Sequence[Any]:
        """See Ticket."""
        return self._ticket.wait_tokens(n_seen, timeout_ms) if self._answers(timeout_ms) else ()

    def wait_finished(self, timeout_ms: int) -> bool:
        """See Ticket."""
        return self._answers(timeout_ms) and self._ticket.wait_finished(timeout_ms)

    def finished(self) -> bool:
        """See Ticket."""
        return self._answers(0) and self._ticket.finished()

    def result(self) -> Any:
        """See Ticket."""
        return self._ticket.result()

    def cancel(self) -> None:
        """See Ticket."""
        self._is_cancelled = True
        self._ticket.cancel()

    def _answers(self, timeout_ms: int) -> bool:
        """Waits for the first run; whether the second has begun, or will not come."""
        with self._lock:
            if self._has_read:
                return True
            reading = self._ticket
            if not reading.wait_tokens(0, timeout_ms) and not reading.finished():
                return False
            reading.cancel()
            while not reading.wait_finished(_WAIT_MS):
                pass
            if reading.wait_tokens(0, 0) and not self._is_cancelled:
                self._summarise()
                self._ticket = self._submit()
                if self._is_cancelled:
                    self._ticket.cancel()
            self._has_read = True
            return True


# Neither this nor a ticket may hold a RequestContext: its end would never come.
def _close(runtime: Any, conversation: int, tickets: Sequence[Ticket]) -> None:
    """Ends a conversation; a request of it must have seen that it is cancelled before."""
    for ticket in tickets:
        ticket.cancel()
    with contextlib.suppress(CancelledError):  # the engine is closed
        runtime.close_conversation(conversation)
