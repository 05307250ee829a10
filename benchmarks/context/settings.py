"""What a run measures, and with whom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.context.cache_methods import CacheMethod, Rounded, SnapKV, Window
from benchmarks.context.dialogues import Dialogue, make_dialogue
from benchmarks.context.documents import LongText, cut, long_texts, plain_sentences
from benchmarks.context.needles import DEPTHS, KINDS, Haystack, make_haystack
from benchmarks.context.small_talk import filler, paragraph
from benchmarks.context.systems import ContextSystem
from benchmarks.context.torch_model import TorchModel
from benchmarks.context.torch_systems import DroppedText, MethodSystem

_MOST_DOCUMENTS = 20  # of other parts
_TALK_SHARE = 0.6  # of a dialogue's turns, small talk
_CHAT_SHARE = 0.9


@dataclass(frozen=True)
class Settings:
    """The size of a run.

    Attributes:
        n_documents: Texts from packages; 0: one of small talk, for tests.
        n_prefix: Tokens of a text that are held.
        n_choosing: Other texts, by which the heads that keep details are chosen.
        n_choosing_prefix: Tokens of these that are held.
        n_read: Tokens of it that are read behind them.
        ratios: By how much methods that can choose make a context smaller.
        n_sentences: Of a haystack's filler.
        n_samples: Haystacks of each kind and depth.
        depths: Where in them needles lie.
        n_dialogues: Dialogues that our engine holds.
        n_compared: Of these, the ones that the others hold, too.
        n_chats: Dialogues that are nearly all small talk.
        n_turns: Of a dialogue, before what is asked.
        n_following: Turns that are read behind them.
        n_told: Sentences of prose in a message of small talk.
        n_chat_told: The same of a chat, which has more such messages.
        n_probes: Questions that our engine answers.
        n_probes_compared: Questions that the others answer.
        n_answer: Most tokens of an answer.
    """

    n_documents: int = 20
    n_prefix: int = 2048
    n_choosing: int = 2
    n_choosing_prefix: int = 1024
    n_read: int = 256
    ratios: Sequence[float] = (2, 4, 8)
    n_sentences: int = 150
    n_samples: int = 4
    depths: Sequence[float] = DEPTHS
    n_dialogues: int = 8
    n_compared: int = 2
    n_chats: int = 4
    n_turns: int = 29
    n_following: int = 2
    n_told: int = 9
    n_chat_told: int = 6
    n_probes: int = 12
    n_probes_compared: int = 4
    n_answer: int = 32

    def texts(self, model: TorchModel) -> list[LongText]:
        """Texts, each of the tokens that are held and those that are read."""
        n_tokens = self.n_prefix + self.n_read
        if self.n_documents:
            return long_texts(model.encoder, self.n_documents, n_tokens)
        return [_small_talk(model, n_tokens)]

    def choosing_texts(self, model: TorchModel) -> list[LongText]:
        """Texts that nothing else is measured with, as `texts`."""
        n_tokens = self.n_choosing_prefix + self.n_read
        if not self.n_documents:
            return [_small_talk(model, n_tokens)]
        # Longer ones, as those of `texts`, so that both are of the same documents in order.
        n_whole = max(n_tokens, self.n_prefix + self.n_read)
        found = long_texts(model.encoder, _MOST_DOCUMENTS + self.n_choosing, n_whole)
        return [LongText(t.name, t.ids[:n_tokens]) for t in found[_MOST_DOCUMENTS:]]

    def haystacks(self) -> list[Haystack]:
        """Of each kind and depth."""
        cases = product(KINDS, self.depths, range(self.n_samples))
        return [
            make_haystack(kind, depth=depth, n_sentences=self.n_sentences, seed=seed)
            for kind, depth, seed in cases
        ]

    def dialogues(self) -> list[Dialogue]:
        """Each with other rules."""
        return self._dialogues(self.n_dialogues, _TALK_SHARE, self.n_told)

    def chats(self) -> list[Dialogue]:
        """Dialogues that are nearly all small talk."""
        return self._dialogues(self.n_chats, _CHAT_SHARE, self.n_chat_told)

    def _dialogues(self, n_dialogues: int, talk_share: float, n_told: int) -> list[Dialogue]:
        prose = plain_sentences() if self.n_documents else filler(random.Random(3), 60)
        return [
            make_dialogue(
                seed,
                prose,
                n_turns=self.n_turns,
                n_following=self.n_following,
                n_sentences=n_told,
                talk_share=talk_share,
            )
            for seed in range(n_dialogues)
        ]

    def systems(self, model: TorchModel) -> list[ContextSystem]:
        """What is compared with F16."""
        methods: list[CacheMethod] = [Rounded("q8_0"), Rounded("q4_0")]
        methods.append(Rounded("q4_0", is_rotated=True))
        methods += [make(ratio) for make, ratio in product((Window, SnapKV), self.ratios)]
        dropped = [DroppedText(model, ratio) for ratio in self.ratios]
        return [*(MethodSystem(model, method) for method in methods), *dropped]


def _small_talk(model: TorchModel, n_tokens: int) -> LongText:
    text = cut("small talk", paragraph(n_tokens), model.encoder, n_tokens)
    assert text is not None
    return text


SMALL = Settings(
    n_documents=0,
    n_prefix=96,
    n_choosing=1,
    n_choosing_prefix=224,
    n_read=24,
    ratios=(4,),
    n_sentences=2,
    n_samples=1,
    depths=(0.5,),
    n_dialogues=1,
    n_compared=1,
    n_chats=1,
    n_turns=3,
    n_following=1,
    n_told=1,
    n_chat_told=1,
    n_probes=2,
    n_probes_compared=1,
    n_answer=2,
)
"""For tests."""
