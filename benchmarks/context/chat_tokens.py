"""Turns of a dialogue as tokens of a base's chat template, each with its tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.context.dialogues import Turn
from benchmarks.context.systems import TierName
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer


class ChatTokens:
    """Writes a dialogue turn by turn, so that each context begins every longer one.

    What the template puts before the first message, such as a system prompt, has its tier.
    """

    def __init__(self, metadata: Mapping[str, object]) -> None:
        """Takes the metadata of the base's file.

        Raises:
            ChatTemplateError: It has no template.
        """
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self._template = ChatTemplate.from_metadata(metadata)
        empty = self.tokenizer.encode("")
        self._opening = empty[:1] if self.tokenizer.bos_id in empty else []

    def context(self, turns: Sequence[Turn]) -> tuple[list[int], list[TierName]]:
        """Tokens of whole turns, and the tier of each."""
        ids, tiers = list(self._opening), list[TierName]([turns[0].tier] * len(self._opening))
        before = ""
        for number, turn in enumerate(turns, start=1):
            text = self._template.render_history(_messages(turns[:number]))
            part = self._encoded(before, text)
            ids += part
            tiers += [turn.tier] * len(part)
            before = text
        return ids, tiers

    def question(self, turns: Sequence[Turn], text: str) -> list[int]:
        """Tokens of a user's message behind turns, up to where the answer begins."""
        history = _messages(turns)
        asked = self._template.render([*history, {"role": "user", "content": text}])
        return self._encoded(self._template.render_history(history), asked)

    def _encoded(self, before: str, text: str) -> list[int]:
        """Tokens of what a text has behind another.

        Raises:
            ValueError: The template changes earlier messages, so that no turn can be added.
        """
        if not text.startswith(before):
            raise ValueError("chat template: expected a history that only grows")
        ids = self.tokenizer.encode_chat(text[len(before) :])
        return ids[len(self._opening) :] if ids[:1] == self._opening else ids


def _messages(turns: Sequence[Turn]) -> list[dict[str, object]]:
    said = ((("user", turn.user), ("assistant", turn.reply)) for turn in turns)
    return [{"role": role, "content": content} for pair in said for role, content in pair]
