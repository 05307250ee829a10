"""A conversation as the tokens the model sees, and which message each of them belongs to."""

from __future__ import annotations

import codecs
import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.message_ranges import MessageRange, Render, find_message_ranges
from modularbase.context_types import Tier
from modularbase.errors import InvalidRequestError
from modularbase.types import Message


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive tokens of one message's text, or of what the template puts around messages.

    Attributes:
        start: Position of the first token.
        token_ids: The tokens.
        token_starts: For each, the character of `text` it begins at; the first is 0.
        text: What they say.
        message_index: The message; of what is around messages, the next one's or the last one's.
        role: Of that message.
        is_control: Whether the template wrote it, or its tokens act instead of standing for text.
        tier: What the caller said of the message, or None.
    """

    start: int
    token_ids: tuple[int, ...]
    token_starts: tuple[int, ...]
    text: str
    message_index: int
    role: str
    is_control: bool
    tier: Tier | None


class Sectioned(Protocol):
    """What is graded: a chat, or a prompt alone."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """The tokens by origin, in order and without gaps."""


@dataclass(frozen=True, slots=True)
class ChatState:
    """All of a chat but its template and tokenizer."""

    messages: tuple[Message, ...]
    tiers: tuple[Tier | None, ...]
    sections: tuple[Section, ...]
    token_ids: tuple[int, ...]


class Chat:
    """A conversation that grows by messages and by what the model generates.

    Tokens once seen are never encoded again, so positions stay what they were.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> None:
        """Begins a conversation; arguments as in `ChatTemplate.render`."""
        self._template = template
        self._tokenizer = tokenizer
        self._tools, self._variables = tools, variables
        self._messages: list[Message] = []
        self._tiers: list[Tier | None] = []
        self._sections: list[Section] = []
        self._token_ids: list[int] = []
        self._awaits_answer = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return tuple(self._token_ids)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far, without their tiers; generated ones without outer white space."""
        return tuple(self._messages)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The tokens by origin, in order and without gaps."""
        return tuple(self._sections)

    def copy(self) -> Chat:
        """The same conversation, to go on in another way."""
        twin = copy.copy(self)
        twin.restore(self.state)
        return twin

    @property
    def state(self) -> ChatState:
        """What `restore` takes; an answer that is awaited is not told."""
        return ChatState(self.messages, tuple(self._tiers), self.sections, tuple(self._token_ids))

    def restore(self, state: ChatState) -> None:
        """Goes on from where another chat of the same base was."""
        self._messages, self._tiers = list(state.messages), list(state.tiers)
        self._sections, self._token_ids = list(state.sections), list(state.token_ids)

    def add_messages(self, messages: Sequence[Message]) -> list[int]:
        """Adds messages up to where the assistant's next one begins.

        Args:
            messages: As `ChatTemplate.render` takes them; each may have a "tier" of its own.

        Returns:
            The new tokens.

        Raises:
            InvalidRequestError: The messages are malformed, or an answer is awaited.
            ChatTemplateError: The template refuses them.
        """
        if self._awaits_answer:
            raise InvalidRequestError("messages", "the answer first (add_generated)", "messages")
        added = self._add(messages, self._render)
        self._awaits_answer = True
        return added

    def add_history(self, messages: Sequence[Message]) -> list[int]:
        """Adds messages of a finished conversation; otherwise as `add_messages`."""
        if self._messages:
            raise InvalidRequestError("messages", "an empty conversation", "one that has begun")
        return self._add(messages, self._render_history)

    def add_generated(self, token_ids: Sequence[int]) -> None:
        """Adds what the model answered, token by token as it came, with or without its end.

        Raises:
            InvalidRequestError: No answer is awaited.
        """
        if not self._awaits_answer:
            raise InvalidRequestError("token_ids", "messages to answer first", "an answer")
        text, starts = self._spelled(token_ids)
        answer = MessageRange(len(self._messages), 0, len(text) + 1)
        content = self._tokenizer.decode_continuation(token_ids).strip()
        self._messages.append({"role": "assistant", "content": content})
        self._tiers.append(None)
        self._append(text, token_ids, starts, [answer])
        self._awaits_answer = False

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Takes tokens out of what the model sees; the messages stay as they are.

        Args:
            ranges: (first position, how many), in order.

        Raises:
            InvalidRequestError: An answer is awaited.
        """
        if self._awaits_answer:
            raise InvalidRequestError("ranges", "the answer first (add_generated)", "ranges")
        sections, self._sections, self._token_ids = self._sections, [], []
        for section in sections:
            begin, end = 0, len(section.token_ids)
            for start, n_tokens in ranges:
                first = min(max(start - section.start, begin), end)
                self._keep(section, begin, first)
                begin = max(begin, min(start + n_tokens - section.start, end))
            self._keep(section, begin, end)

    def _keep(self, section: Section, begin: int, end: int) -> None:
        """Adds the tokens [begin, end) of an old section."""
        if begin >= end:
            return
        starts = section.token_starts
        stop = starts[end] if end < len(starts) else len(section.text)
        kept = replace(
            section,
            start=len(self._token_ids),
            token_ids=section.token_ids[begin:end],
            token_starts=tuple(at - starts[begin] for at in starts[begin:end]),
            text=section.text[starts[begin] : stop],
        )
        self._sections.append(kept)
        self._token_ids += kept.token_ids

    def _render(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages, tools=self._tools, variables=self._variables)

    def _render_history(self, messages: Sequence[Message]) -> str:
        return self._template.render_history(messages, tools=self._tools, variables=self._variables)

    def _add(self, messages: Sequence[Message], render: Render) -> list[int]:
        bare, tiers = split_tiers(messages, len(self._messages))
        everything = [*self._messages, *bare]
        text = render(everything)
        ranges = find_message_ranges(text, everything, render, self._render_history)
        if self._messages:
            behind = self._end_of_answer(text, ranges)
            text = text[behind:]
            ranges = [
                MessageRange(r.message_index, max(r.begin - behind, 0), r.end - behind)
                for r in ranges
                if r.message_index >= len(self._messages)
            ]
            ids, starts = self._tokenizer.encode_continuation_with_starts(text)
            # The model may have ended its answer itself.
            if ids and ids[0] == self._token_ids[-1] and self._tokenizer.is_control(ids[0]):
                ids, starts = ids[1:], starts[1:]
        else:
            ids, starts = self._tokenizer.encode_chat_with_starts(text)
        self._messages += bare
        self._tiers += tiers
        self._append(text, ids, starts, ranges)
        return ids

    def _end_of_answer(self, text: str, ranges: Sequence[MessageRange]) -> int:
        """Where the rendering goes on behind the last message so far."""
        answer = len(self._messages) - 1
        content = str(self._messages[answer]["content"])
        for found in ranges:
            if found.message_index == answer:
                at = text.rfind(content, found.begin, found.end)
                return found.end if at < 0 else at + len(content)
        return min((r.begin for r in ranges if r.message_index > answer), default=len(text))

    def _spelled(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of tokens, control tokens by name, and where each begins."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, starts = "", []
        for token_id in token_ids:
            starts.append(len(text))
            text += decoder.decode(self._tokenizer.token_bytes(token_id))
        return text + decoder.decode(b"", final=True), starts

    def _append(
        self, text: str, ids: Sequence[int], starts: Sequence[int], ranges: Sequence[MessageRange]
    ) -> None:
        ends = [found.end for found in ranges]
        owners = [
            self._owner(token_id, at, ranges[bisect_right(ends, at) :])
            for token_id, at in zip(ids, starts, strict=True)
        ]
        n_before = len(self._token_ids)
        for (message_index, is_control), group in groupby(range(len(ids)), owners.__getitem__):
            tokens = list(group)
            begin, end = tokens[0], tokens[-1] + 1
            offset = starts[begin]
            stop = starts[end] if end < len(ids) else len(text)
            self._sections.append(
                Section(
                    start=n_before + begin,
                    token_ids=tuple(ids[begin:end]),
                    token_starts=tuple(at - offset for at in starts[begin:end]),
                    text=text[offset:stop],
                    message_index=message_index,
                    role=str(self._messages[message_index]["role"]),
                    is_control=is_control,
                    tier=None if is_control else self._tiers[message_index],
                )
            )
        self._token_ids += ids

    def _owner(
        self, token_id: int, at: int, ranges_ahead: Sequence[MessageRange]
    ) -> tuple[int, bool]:
        """The message of a token, and whether the token is a part of the frame around it."""
        if not ranges_ahead:
            return len(self._messages) - 1, True
        is_control = at < ranges_ahead[0].begin or self._tokenizer.is_control(token_id)
        return ranges_ahead[0].message_index, is_control


def split_tiers(
    messages: Sequence[Message], n_before: int = 0
) -> tuple[list[Message], list[Tier | None]]:
    """The messages without their tiers, and these.

    Args:
        messages: As `Chat.add_messages` takes them.
        n_before: Messages before them, for the errors.

    Raises:
        InvalidRequestError: There are none, or a tier is none.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequestError("messages", "a list of messages", repr(messages)[:80])
    tiers = [_tier(n_before + i, message) for i, message in enumerate(messages)]
    return [_without_tier(message) for message in messages], tiers


def _tier(index: int, message: Message) -> Tier | None:
    tier = message.get("tier") if isinstance(message, Mapping) else None
    if tier is None:
        return None
    try:
        return Tier(tier)
    except ValueError as error:
        names = ", ".join(tier.value for tier in Tier)
        raise InvalidRequestError(f"messages[{index}].tier", names, repr(tier)) from error


def _without_tier(message: Message) -> Message:
    if not isinstance(message, Mapping):
        return message  # the template says what is wrong with it
    return {key: value for key, value in message.items() if key != "tier"}
