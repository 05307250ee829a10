"""A running request: its text as it comes, its result, and how to stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from modularbase.bases.text_stream import StopMatcher, StreamDecoder
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context_types import ContextReport
from modularbase.errors import CancelledError
from modularbase.types import (
    Fallback,
    FinishReason,
    FloatArray,
    PackSwitch,
    Piece,
    Result,
    SamplingParams,
    Timings,
    TokenLogprobs,
    Usage,
    UsedPack,
)

# Waits are cut so that Python can run signal handlers (Ctrl-C) between them.
_WAIT_MS = 100


class _Logprob(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def logprob(self) -> float: ...


class _Token(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top_logprobs(self) -> Sequence[_Logprob]: ...


class _Timings(Protocol):
    @property
    def queue_us(self) -> float: ...
    @property
    def prefill_us(self) -> float: ...
    @property
    def decode_us(self) -> float: ...


class _Reason(Protocol):
    @property
    def name(self) -> str: ...


class _PackSwitch(Protocol):
    @property
    def n_generated(self) -> int: ...
    @property
    def from_digest(self) -> str: ...
    @property
    def to_digest(self) -> str: ...


class RawResult(Protocol):
    """What the C++ engine knows of a finished request."""

    @property
    def finish_reason(self) -> _Reason | None:
        """Why it ended; None while it runs."""

    @property
    def n_prompt(self) -> int:
        """Prompt tokens."""

    @property
    def n_cached(self) -> int:
        """Prompt tokens taken from the prefix cache."""

    @property
    def n_cached_lower(self) -> int:
        """Prompt tokens that the layers up to the first site knew."""

    @property
    def n_drafted(self) -> int:
        """Tokens proposed by prompt lookup."""

    @property
    def n_accepted(self) -> int:
        """Proposed tokens that were kept."""

    @property
    def pack_choice(self) -> int:
        """Which of the request's pack choices it ran with; -1: none."""

    @property
    def pack_errors(self) -> Sequence[str]:
        """Why the choices before it could not be had."""

    @property
    def pack_switches(self) -> Sequence[_PackSwitch]:
        """Generations of packs that it left for newer ones on the way."""

    @property
    def pack_conflict(self) -> FloatArray:
        """Mean cosine between what its packs add, a layer."""

    @property
    def timings(self) -> _Timings:
        """Where the time went."""


class PackOutcome(Protocol):
    """What was prepared of a request's packs."""

    def outcome(
        self, choice: int, errors: Sequence[str]
    ) -> tuple[tuple[UsedPack, ...], tuple[Fallback, ...]]:
        """Which packs were used, and which were given up."""

    def release(self) -> None:
        """The request needs its packs no longer."""


class OwnContext(Protocol):
    """What is kept of a request's context while it runs."""

    def settle(self) -> ContextReport | None:
        """The request is over: what was kept of it."""


class Ticket(Protocol):
    """What the C++ engine gives for a submitted request."""

    def wait_tokens(self, n_seen: int, timeout_ms: int) -> Sequence[_Token]:
        """Tokens after the first n_seen, as soon as there are any or the request has ended."""

    def wait_finished(self, timeout_ms: int) -> bool:
        """Whether the request has ended within the time."""

    def finished(self) -> bool:
        """Whether the request has ended."""

    def result(self) -> RawResult:
        """What there is so far."""

    def cancel(self) -> None:
        """Ends the request at the next step."""


class Generation:
    """A submitted generation: iterate it for the pieces, ask for the result, or cancel it.

    Iterating again starts from the first piece. Safe to use from several threads.
    """

    def __init__(
        self,
        ticket: Ticket,
        tokenizer: Tokenizer,
        matcher: StopMatcher,
        params: SamplingParams,
        packs: PackOutcome,
        context: OwnContext | None = None,
    ) -> None:
        """Use `Engine.submit`."""
        self._ticket = ticket
        self._params = params
        self._packs = packs
        self._context = context
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = matcher
        self._has_stops = bool(params.stop)
        self._lock = threading.Lock()  # guards all below
        self._pieces: list[Piece] = []
        self._tokens: list[_Token] = []
        self._ended = False

    def __iter__(self) -> Iterator[Piece]:
        """Yields text as it comes; abandoning the loop does not cancel the request.

        Raises:
            ModularBaseError: What made the request fail.
        """
        n_seen = 0
        while True:
            ended = self._advance()
            pieces = self._pieces[n_seen:]
            n_seen += len(pieces)
            yield from pieces
            if ended and n_seen == len(self._pieces):
                return

    def result(self, timeout_s: float | None = None) -> Result:
        """Waits for the end.

        Raises:
            TimeoutError: Not finished within timeout_s; the request goes on.
            CancelledError: Cancelled from outside, or the engine was closed.
            ModularBaseError: What made the request fail.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self._settle():
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"not finished within {timeout_s} s")
        except KeyboardInterrupt:
            self.cancel()
            raise
        return self._result()

    def cancel(self) -> None:
        """Ends the request at the next step; what was generated stays readable."""
        self._ticket.cancel()
        self._packs.release()

    def wait(self) -> None:
        """Waits for the end, whichever it is."""
        while not self._ticket.wait_finished(_WAIT_MS):
            pass

    def finished(self) -> bool:
        """Whether all of it has been generated."""
        return self._ended or self._ticket.finished()

    def _settle(self) -> bool:
        # Without stop strings nobody needs the tokens one by one: sleep until the end.
        if not self._has_stops and not self._ticket.wait_finished(_WAIT_MS):
            return False
        return self._advance()

    def _advance(self) -> bool:
        """Takes the tokens that have come since the last call; True when there will be no more."""
        with self._lock:
            if self._ended:
                return True
            was_finished = self._ticket.finished()
            tokens = self._ticket.wait_tokens(len(self._tokens), _WAIT_MS)
            text = ""
            taken: list[_Token] = []
            for token in tokens:
                taken.append(token)
                text += self._matcher.push(self._decoder.push(token.id))
                if self._matcher.matched is not None:
                    self._ticket.cancel()
                    break
            self._tokens += taken
            if was_finished or self._matcher.matched is not None:
                text += self._matcher.push(self._decoder.finish()) + self._matcher.finish()
                self._ended = True
                self._packs.release()
            if taken or text:
                self._pieces.append(Piece(text, [token.id for token in taken]))
            return self._ended

    def _result(self) -> Result:
        if self._matcher.matched is not None:
            self.wait()
        context = self._context.settle() if self._context else None
        raw = self._ticket.result()
        used, fallbacks = self._packs.outcome(raw.pack_choice, raw.pack_errors)
        reason = self._finish_reason(raw.finish_reason.name if raw.finish_reason else "cancelled")
        return Result(
            text="".join(piece.text for piece in self._pieces),
            token_ids=[token.id for token in self._tokens],
            finish_reason=reason,
            usage=_usage(raw, len(self._tokens)),
            timings=_timings(raw, len(self._tokens)),
            logprobs=self._logprobs(),
            packs=used,
            fallbacks=fallbacks,
            pack_conflict={
                layer: float(value)
                for layer, value in enumerate(raw.pack_conflict)
                if value == value  # NaN: no two packs have a site there
            },
            pack_switches=tuple(
                PackSwitch(change.n_generated, change.from_digest, change.to_digest)
                for change in raw.pack_switches
            ),
            context=context,
        )

    def _finish_reason(self, name: str) -> FinishReason:
        if self._matcher.matched is not None:
            return "stop"
        if name == "cancelled":
            raise CancelledError("the request was cancelled")
        reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        return reasons.get(name, "deadline")

    def _logprobs(self) -> list[TokenLogprobs] | None:
        if self._params.logprobs is None:
            return None
        return [
            TokenLogprobs(token.id, token.logprob, {t.id: t.logprob for t in token.top_logprobs})
            for token in self._tokens
        ]


def _usage(raw: RawResult, n_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=raw.n_prompt,
        completion_tokens=n_tokens,
        cached_tokens=raw.n_cached,
        cached_lower_tokens=raw.n_cached_lower,
        drafted_tokens=raw.n_drafted,
        accepted_tokens=raw.n_accepted,
    )


def _timings(raw: RawResult, n_tokens: int) -> Timings:
    prefill_ms = raw.timings.prefill_us / 1e3
    decode_ms = raw.timings.decode_us / 1e3
    n_computed = raw.n_prompt - raw.n_cached
    return Timings(
        queue_ms=raw.timings.queue_us / 1e3,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
        prefill_tps=1e3 * n_computed / prefill_ms if prefill_ms > 0 else 0.0,
        decode_tps=1e3 * (n_tokens - 1) / decode_ms if decode_ms > 0 else 0.0,
    )
