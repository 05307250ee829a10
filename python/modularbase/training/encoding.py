"""Documents into tokens, as the base's tokenizer and chat template have them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.tokenizer import Tokenizer
from modularbase.training.texts import Document


class Encoder:
    """Encodes documents for one base.

    Attributes:
        tokenizer: The base's.
        opening: What a sequence begins with: a BOS token, or nothing.
        end_id: Token between two documents, or None.
    """

    def __init__(self, metadata: Mapping[str, object]) -> None:
        """Takes the metadata of the base's file.

        Raises:
            TokenizerError: It has no sound tokenizer.
        """
        self._metadata = metadata
        self.tokenizer = Tokenizer.from_metadata(metadata)
        empty = self.tokenizer.encode("")
        self.opening = empty[:1] if self.tokenizer.bos_id in empty else []
        self.end_id = self.tokenizer.eos_id

    def encode(self, document: Document) -> tuple[list[int], list[int]]:
        """Token ids of what is only seen, and of what is learnt.

        A prompt becomes a user's message, and what is learnt is the assistant's turn with the token
        that ends it. Special tokens in a text are mere characters.

        Raises:
            ChatTemplateError: The base has no template for the prompt, or it fails.
        """
        learnt = self.tokenizer.encode_plain(document.text)
        if document.prompt is None:
            return [], learnt
        chat = self._template.render([{"role": "user", "content": document.prompt}])
        seen = self.tokenizer.encode_chat(chat)
        if seen[:1] == self.opening:
            seen = seen[len(self.opening) :]
        end = self.tokenizer.eot_id if self.tokenizer.eot_id is not None else self.end_id
        return seen, learnt if end is None else [*learnt, end]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.from_metadata(self._metadata)
