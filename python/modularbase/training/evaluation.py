"""What a pack does to text that it is not trained on, measured with the twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from modularbase.training.data import TokenBlocks
from modularbase.training.losses import kl_to_base
from modularbase.training.objective import NextToken, before_last
from modularbase.training.twin import Twin

_BATCH_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """Means over the held-out blocks.

    Attributes:
        loss: Cross-entropy on the domain, in nats a token.
        neutral_loss: Cross-entropy on neutral text; None where there is none.
        neutral_kl: KL(base || pack) on neutral text, in nats a token; None where there is none.
    """

    loss: float
    neutral_loss: float | None
    neutral_kl: float | None

    def total(self, kl_weight: float) -> float:
        """What a run lowers: the domain's loss, and KL on neutral text times its weight."""
        return self.loss + kl_weight * (self.neutral_kl or 0.0)

    def figures(self) -> dict[str, float]:
        """What is known, by name, with perplexities."""
        found = {"loss": self.loss, "perplexity": math.exp(self.loss)}
        if self.neutral_loss is not None and self.neutral_kl is not None:
            found |= {"neutral_kl": self.neutral_kl, "neutral_loss": self.neutral_loss}
            found["neutral_perplexity"] = math.exp(self.neutral_loss)
        return found


class HeldOut:
    """Held-out blocks; their lower half is run once and kept."""

    def __init__(
        self,
        twin: Twin,
        domain: TokenBlocks,
        neutral: TokenBlocks,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Runs the lower half.

        Args:
            twin: What is measured.
            domain: Blocks of the domain.
            neutral: Blocks of neutral text; may be empty.
            autocast: The arithmetic to measure in.
        """
        self._twin, self._autocast = twin, autocast
        self._domain = list(self._entered(domain))
        self._neutral = list(self._entered(neutral))

    def measure(self, *, with_pack: bool = True) -> Measurement:
        """Measures the pack as it is now; with_pack=False, the plain base."""
        loss = neutral_loss = kl = 0.0
        with torch.no_grad(), self._autocast():
            for blocks, hidden in self._domain:
                loss += self._loss(blocks, self._final(hidden, with_pack))
            for blocks, hidden in self._neutral:
                final = self._final(hidden, with_pack)
                plain = self._final(hidden, False)
                neutral_loss += self._loss(blocks, final)
                kl += float(kl_to_base(before_last(final), self._twin.head, before_last(plain)))
        loss /= sum(blocks.n_learnt for blocks, _ in self._domain)
        if not self._neutral:
            return Measurement(loss, None, None)
        n_learnt = sum(blocks.n_learnt for blocks, _ in self._neutral)
        n_rows = sum(blocks.n_tokens - len(blocks) for blocks, _ in self._neutral)
        return Measurement(loss, neutral_loss / n_learnt, kl / n_rows)

    def _entered(self, blocks: TokenBlocks) -> Iterator[tuple[TokenBlocks, torch.Tensor]]:
        for first in range(0, len(blocks), _BATCH_BLOCKS):
            part = blocks[first : first + _BATCH_BLOCKS]
            ids = torch.from_numpy(part.ids).to(self._twin.head.device)
            with self._autocast():
                yield part, self._twin.enter(ids)

    def _final(self, hidden: torch.Tensor, with_pack: bool) -> torch.Tensor:
        return self._twin.forward_from(hidden, with_pack=with_pack).final

    def _loss(self, blocks: TokenBlocks, final: torch.Tensor) -> float:
        return float(NextToken().loss(final, self._twin.head, blocks))
