"""A dialogue whose keys and values stay in the engine from turn to turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from modularbase.context.chat import Chat
from modularbase.context.floors import spans_of
from modularbase.context.forgetting import ranges_of, spans_to_forget
from modularbase.context.plan import ContextGrader, TierPlan
from modularbase.context.scores import SpanSignals
from modularbase.context.similarity import similarity_to_newest
from modularbase.context.surprise import Surprises
from modularbase.context_types import ContextOptions, ContextReport
from modularbase.conversation_file import Header, Kept, read_conversation, write_conversation
from modularbase.conversation_host import Host, Turn, carry_out, kept_report
from modularbase.conversation_signals import span_signals
from modularbase.errors import CancelledError, ConversationFileError, InvalidRequestError
from modularbase.generation import Generation
from modularbase.request_specs import chosen_params
from modularbase.types import Message, Packs, Result, SamplingParams


class Conversation:
    """A dialogue with a base; `Engine.conversation` begins one.

    The engine keeps what it computed for earlier turns, so a turn costs what is new in it. With
    `Engine.load(kv="tiered")` older text is kept in tiers. One turn at a time; safe to use from
    several threads otherwise.
    """

    def __init__(self, host: Host, options: ContextOptions | None, packs: Packs) -> None:
        """Use `Engine.conversation`; options None: nothing is compacted by plan."""
        self._host, self._runtime = host, host.runtime
        self._options, self._packs = options, packs
        self._chat = Chat(host.template, host.tokenizer)
        self._grader = ContextGrader()
        self._surprises = Surprises()
        self._plan: TierPlan | None = None
        self._n_rehydrated = 0
        self._n_forgotten = 0
        self._lock = threading.Lock()
        self._id: int | None = self._runtime.open_conversation()

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a file that `save` wrote, instead of from where it is.

        Raises:
            ConversationFileError: The file cannot be used with this engine.
            KvCacheFullError: The engine has no room for it.
        """
        host = self._host
        header, data = read_conversation(Path(path), host.base.digest, host.layout)
        kept = header.kept
        try:
            image = host.make_image(
                kept.tokens,
                kept.n_valid,
                kept.n_positions,
                bytes(kept.tiers),
                kept.spans,
                kept.blocks,
                data,
            )
            restored = self._runtime.load_conversation(image)
        except (InvalidRequestError, TypeError, ValueError) as error:
            raise ConversationFileError(
                str(path), "kept", "what a cache holds", str(error)
            ) from error
        self.close()
        self._id = restored
        self._chat.restore(header.chat)
        self._grader.restore(header.grader)
        self._surprises = Surprises()
        self._n_forgotten = header.forgotten_tokens

    def __enter__(self) -> Conversation:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the conversation."""
        self.close()

    def close(self) -> None:
        """Frees what the engine keeps of it; closing twice is fine."""
        with self._lock:
            if self._id is not None:
                self._runtime.close_conversation(self._id)
                self._id = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far."""
        return self._chat.messages

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return self._chat.token_ids

    def chat(
        self,
        content: str | Message | Sequence[Message],
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Result:
        """Says something and waits for the answer.

        Args:
            content: What the user says, or a message, or several; a message may have a "tier".
            params: How tokens are chosen.
            **overrides: Fields of `SamplingParams`, over those of params.

        Returns:
            The answer; `Result.context` tells what is kept of the conversation, and how.

        Raises:
            ModularBaseError: As `Engine.chat`. The conversation is then as it was before.
            ContextBudgetError: The budget is too small for what must be kept.
        """
        with self._turn(content, params, overrides) as generation:
            result = generation.result()
            self._add_answer(result)
        return replace(result, context=self.context)

    def stream(
        self,
        content: str | Message | Sequence[Message],
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Generator[str, None, None]:
        """Yields the answer's text as it comes; leaving the loop takes the turn back."""
        with self._turn(content, params, overrides) as generation:
            ended = False
            try:
                for piece in generation:
                    if piece.text:
                        yield piece.text
                result = generation.result()
                ended = True
            finally:
                if not ended:
                    generation.cancel()
                    generation.wait()  # until then a request has the conversation's memory
            self._add_answer(result)

    def fork(self) -> Conversation:
        """A second conversation that goes on from here, to try another way.

        Both share what is kept so far, so this costs no memory and no time; what the newest
        queries attended to is known to the first alone, until the second has had a turn.

        Raises:
            InvalidRequestError: A turn runs.
        """
        with self._alone():
            twin = Conversation(self._host, self._options, self._packs)
            twin.close()
            twin._id = self._runtime.fork_conversation(self._open_id())
            twin._chat = self._chat.copy()
            twin._grader.restore(self._grader.state)
            twin._plan, twin._n_forgotten = self._plan, self._n_forgotten
            return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation to a file: what was said, and what the engine keeps of it.

        The file is there whole or not at all. Keys and values that packs had a part in are not
        written; they are computed again when the conversation goes on.

        Raises:
            InvalidRequestError: A turn runs.
            InstallError: The file cannot be written.
        """
        with self._alone():
            image = self._runtime.save_conversation(self._open_id())
            header = Header(
                base_digest=self._host.base.digest,
                layout=self._host.layout,
                chat=self._chat.state,
                grader=self._grader.state,
                forgotten_tokens=self._n_forgotten,
                kept=Kept(
                    tokens=image.tokens,
                    n_valid=image.n_valid,
                    n_positions=image.n_positions,
                    tiers=list(image.tiers),
                    spans=image.spans,
                    blocks=image.blocks,
                ),
            )
            write_conversation(Path(path), header, image.data)

    @property
    def context(self) -> ContextReport | None:
        """What is kept of the conversation, and how; None where the engine has no tiers."""
        if self._plan is None:
            return None
        state = self._runtime.context_state(self._open_id())
        report = replace(
            self._plan.report,
            rehydrated_tokens=self._n_rehydrated,
            forgotten_tokens=self._n_forgotten,
        )
        return kept_report(report, state)

    @contextmanager
    def _turn(
        self,
        content: str | Message | Sequence[Message],
        params: SamplingParams | None,
        overrides: dict[str, Any],
    ) -> Iterator[Generation]:
        """Undoes what a turn that fails has added; compacts behind one that does not."""
        chosen = chosen_params(params, overrides)
        with self._alone():
            before, messages = self._chat, _messages(content)
            try:
                self._chat = self._continued(messages)
                n_over = (
                    len(self._chat.token_ids) + _n_answer(chosen, self._host) - self._host.n_ctx
                )
                if n_over > 0:
                    before = self._forgetting(before, n_over)
                    self._chat = before
                    self._chat = self._continued(messages)
                turn = self._next_turn(chosen)
                yield self._host.submit(turn)
                if self._options:
                    self._note_rehydrated(turn)
                    self._compact(self._options)
            except BaseException:
                self._chat = before
                self._surprises.truncate(len(before.token_ids))
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No turn runs meanwhile, or this is an error."""
        if not self._lock.acquire(blocking=False):
            raise InvalidRequestError("conversation", "one turn at a time", "another one runs")
        try:
            yield
        finally:
            self._lock.release()

    def _open_id(self) -> int:
        if self._id is None:
            raise CancelledError("the conversation is closed")
        return self._id

    def _continued(self, messages: Sequence[Message]) -> Chat:
        chat = self._chat.copy()
        chat.add_messages(messages)
        return chat

    def _forgetting(self, chat: Chat, n_over: int) -> Chat:
        """The conversation without what matters least; what is left need not be read again.

        A quarter of the context goes at once where it can, so that this is rare. Without enough
        that may go, nothing goes, and the engine will say what is too long.
        """
        n_wanted = max(n_over, self._host.n_ctx // 4)
        spans = spans_to_forget(chat, self._grader.summarised, n_wanted)
        if sum(span.n_tokens for span in spans) < n_over:
            return chat
        ranges = ranges_of(spans)
        shorter = chat.copy()
        shorter.forget(ranges)
        # What the engine cannot move it computes again.
        self._runtime.forget(self._open_id(), ranges)
        self._grader.forget(ranges)
        self._surprises.forget(ranges)
        self._n_forgotten += sum(n_tokens for _, n_tokens in ranges)
        return shorter

    def _add_answer(self, result: Result) -> None:
        """Log-probabilities take the whole output head, so that only who asks for them has them."""
        logprobs = [token.logprob for token in result.logprobs or ()]
        self._surprises.add(len(self._chat.token_ids), logprobs)
        self._chat.add_generated(result.token_ids)

    def _next_turn(self, params: SamplingParams) -> Turn:
        tiers, rehydrate = b"", []
        if self._options:
            tiers = self._graded(None).tiers
        if self._options and self._grader.summarised:
            similarity = similarity_to_newest(spans_of(self._chat.sections))
            found = self._grader.spans_to_rehydrate(self._chat, similarity, self._options)
            rehydrate = [span.start for span in found]
        return Turn(self._chat.token_ids, tiers, rehydrate, self._open_id(), params, self._packs)

    def _note_rehydrated(self, turn: Turn) -> None:
        spans = self._runtime.context_state(self._open_id()).spans
        summarised = {start for start, _, _ in spans}
        self._grader.still_summarised(summarised)
        self._n_rehydrated = sum(
            span.n_tokens
            for span in spans_of(self._chat.sections)
            if span.start in turn.rehydrate and span.start not in summarised
        )

    def _graded(self, signals: SpanSignals | None) -> TierPlan:
        assert self._options is not None
        self._plan = self._grader.plan(self._chat, signals, self._host.costs, self._options)
        return self._plan

    def _compact(self, options: ContextOptions) -> None:
        host, chat = self._host, self._chat
        undecided = self._grader.undecided(chat, host.costs, options)
        signals = None
        if undecided:
            spans = spans_of(chat.sections)
            signals = span_signals(host, self._open_id(), spans, undecided, self._surprises)
        plan = self._graded(signals)
        n_past = max(0, len(chat.token_ids) - options.window_tokens)
        carry_out(self._runtime, self._open_id(), plan, self._grader, host.costs, options, n_past)


def _messages(content: str | Message | Sequence[Message]) -> list[Message]:
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    return [content] if isinstance(content, Mapping) else list(content)


def _n_answer(params: SamplingParams, host: Host) -> int:
    """Room for the answer: all of it, or where its length is open, an eighth of the context."""
    return host.n_ctx // 8 if params.max_tokens is None else params.max_tokens
