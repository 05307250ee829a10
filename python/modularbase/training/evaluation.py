"""What a pack does to text that it is not trained on, measured with the twin."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from modularbase.training.data import TokenBlocks
from modularbase.training.losses import kl_to_base
from modularbase.training.objective import NextToken, Objective, before_last
from modularbase.training.states import StateSource
from modularbase.training.twin import Twin

_BATCH_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """Means over the held-out blocks.

    Attributes:
        domain: What the objective says of the domain, in nats a token; `loss` is cross-entropy.
        neutral_loss: Cross-entropy on neutral text; None where there is none.
        neutral_kl: KL(base || pack) on neutral text, in nats a token; None where there is none.
    """

    domain: Mapping[str, float]
    neutral_loss: float | None
    neutral_kl: float | None

    @property
    def loss(self) -> float:
        """Cross-entropy on the domain, in nats a token."""
        return self.domain["loss"]

    def total(self, kl_weight: float) -> float:
        """What a run lowers: the domain's objective, and KL on neutral text times its weight."""
        return self.domain.get("objective", self.loss) + kl_weight * (self.neutral_kl or 0.0)

    def figures(self) -> dict[str, float]:
        """What is known, by name, with perplexities."""
        found = {**self.domain, "perplexity": math.exp(self.loss)}
        if self.neutral_loss is not None and self.neutral_kl is not None:
            found |= {"neutral_kl": self.neutral_kl, "neutral_loss": self.neutral_loss}
            found["neutral_perplexity"] = math.exp(self.neutral_loss)
        return found


class HeldOut:
    """Held-out blocks; what does not depend on the pack is asked for once and kept."""

    def __init__(
        self,
        twin: Twin,
        domain: TokenBlocks,
        neutral: TokenBlocks,
        states: StateSource,
        autocast: Callable[[], AbstractContextManager[None]],
        objective: Objective,
    ) -> None:
        """Asks for the base's states.

        Args:
            twin: What is measured.
            domain: Blocks of the domain.
            neutral: Blocks of neutral text; may be empty.
            states: The base's.
            autocast: The arithmetic to measure in.
            objective: What the domain's text is to teach.
        """
        self._twin, self._autocast, self._objective = twin, autocast, objective
        self._domain = [(part, states.entering(part.ids)) for part in _parts(domain)]
        entered = ((part, states.entering(part.ids)) for part in _parts(neutral))
        self._neutral = [(part, hidden, states.final(part.ids, hidden)) for part, hidden in entered]

    def measure(self, *, with_pack: bool = True) -> Measurement:
        """Measures the pack as it is now; with_pack=False, the plain base."""
        sums: defaultdict[str, float] = defaultdict(float)
        neutral_loss = kl = 0.0
        with torch.no_grad(), self._autocast():
            for blocks, hidden in self._domain:
                final = self._final(hidden, with_pack)
                told = self._objective.figures(final, self._twin.head, blocks)
                for name, value in told.items():
                    sums[name] += value
            for blocks, hidden, plain in self._neutral:
                final = self._final(hidden, True) if with_pack else plain
                neutral_loss += float(NextToken().loss(final, self._twin.head, blocks))
                kl += float(kl_to_base(before_last(final), self._twin.head, before_last(plain)))
        n_learnt = sum(blocks.n_learnt for blocks, _ in self._domain)
        domain = {name: value / n_learnt for name, value in sums.items()}
        if not self._neutral:
            return Measurement(domain, None, None)
        n_learnt = sum(blocks.n_learnt for blocks, *_ in self._neutral)
        n_rows = sum(blocks.n_tokens - len(blocks) for blocks, *_ in self._neutral)
        return Measurement(domain, neutral_loss / n_learnt, kl / n_rows)

    def _final(self, hidden: torch.Tensor, with_pack: bool) -> torch.Tensor:
        return self._twin.forward_from(hidden, with_pack=with_pack).final


def _parts(blocks: TokenBlocks) -> Iterator[TokenBlocks]:
    for first in range(0, len(blocks), _BATCH_BLOCKS):
        yield blocks[first : first + _BATCH_BLOCKS]
