"""What is compared: systems that hold a context in some form, and answer behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from modularbase.types import FloatArray

TierName = Literal["key", "important", "redundant"]


class HeldContext(Protocol):
    """A context as a system keeps it; it stays as it is, whatever is asked behind it."""

    @property
    def n_bytes(self) -> int:
        """Of all its keys and values, with what belongs to them."""

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Reads tokens behind the context.

        Args:
            ids: What follows; these tokens are kept exactly.

        Returns:
            [n_tokens, n_vocab]: row i tells what comes after ids[i].
        """

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Continues greedily behind the context and `ids`, up to an end of the turn."""


class ContextSystem(Protocol):
    """A way to keep a context."""

    @property
    def name(self) -> str:
        """As tables have it."""

    @property
    def heeded_tiers(self) -> Sequence[TierName]:
        """The tiers of those that the caller says for which it is measured; none: it heeds none."""

    def hold(self, ids: Sequence[int], tiers: Sequence[TierName] | None = None) -> HeldContext:
        """Takes a context in.

        Args:
            ids: Its tokens.
            tiers: What the caller says of each token; None leaves it to the system, and
                those that heed none ignore it.
        """
