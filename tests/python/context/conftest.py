"""A tokenizer of a real kind, small enough to be trained in a moment, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import pytest
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.merging import byte_level_splits
from modularbase.bases.pre_tokenizers import pre_tokenizer
from modularbase.bases.tokenizer import Tokenizer
from modularbase.bases.vocab import byte_characters
from modularbase.context.chat import Chat
from modularbase.types import Message
from tests.tools.labelled_dialogues import make_dialogue

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class ChatOf(Protocol):
    """Makes finished conversations."""

    def __call__(self, messages: Sequence[Message], template: str = ...) -> Chat: ...


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level vocabulary of about 2000 tokens, trained on generated dialogues."""
    core = Core(BPE())
    core.pre_tokenizer = byte_level_splits(pre_tokenizer("gpt-2"))
    trainer = BpeTrainer(vocab_size=2000, initial_alphabet=byte_characters(), show_progress=False)
    texts = [str(m["content"]) for seed in range(8) for m in make_dialogue(seed, 60, 0.5).messages]
    core.train_from_iterator(texts, trainer)
    learned = [token for token, _ in sorted(core.get_vocab().items(), key=lambda pair: pair[1])]
    tokens = [*CONTROL, *learned]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * len(learned),
            "tokenizer.ggml.merges": _merges(core),
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False,
        }
    )


def _merges(core: Core) -> list[str]:

    merges = json.loads(core.to_str())["model"]["merges"]
    return [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]


@pytest.fixture
def chat_of(tokenizer: Tokenizer) -> ChatOf:
    """Finished conversations in ChatML, or with another template."""

    def make(messages: Sequence[Message], template: str = CHATML) -> Chat:
        chat = Chat(ChatTemplate(template, bos_token="<|endoftext|>"), tokenizer)
        chat.add_history(messages)
        return chat

    return make
