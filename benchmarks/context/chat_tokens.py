"""Turns of a dialogue as tokens of a base's chat template, as conversations have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.context.dialogues import Turn
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.context.chat import Chat


class ChatWriter:
    """Writes dialogues for a base."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        """Takes the metadata of the base's file.

        Raises:
            ChatTemplateError: It has no template.
        """
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self._template = ChatTemplate.from_metadata(metadata)

    def write(self, turns: Sequence[Turn]) -> WrittenTurns:
        """Whole turns, from the first one on."""
        chat = Chat(self._template, self.tokenizer)
        for turn in turns:
            chat.add_messages([said(turn.user)])
            chat.add_generated(self.reply(turn))
        return WrittenTurns(turns, chat, self)

    def reply(self, turn: Turn) -> list[int]:
        """What the model would have generated, up to the end of its turn."""
        end = self.tokenizer.eot_id
        return [*self.tokenizer.encode_plain(turn.reply), *([] if end is None else [end])]


class WrittenTurns:
    """The beginning of a dialogue as a base sees it."""

    def __init__(self, turns: Sequence[Turn], chat: Chat, writer: ChatWriter) -> None:
        """Use `ChatWriter.write`."""
        self.turns, self._chat, self.writer = turns, chat, writer

    @property
    def chat(self) -> Chat:
        """The same, to be graded."""
        return self._chat.copy()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self._chat.token_ids

    def question(self, text: str) -> list[int]:
        """Tokens of a user's message behind the turns, up to where the answer begins."""
        return self.chat.add_messages([said(text)])

    def following(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of turns behind these."""
        chat = self.chat
        for turn in turns:
            chat.add_messages([said(turn.user)])
            chat.add_generated(self.writer.reply(turn))
        return list(chat.token_ids[len(self.ids) :])


def said(text: str) -> dict[str, str]:
    """A user's message."""
    return {"role": "user", "content": text}
