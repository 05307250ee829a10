"""Which packs a text is for, and in which shares, from a hidden state of the resident base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from modularbase.errors import InvalidRequestError
from modularbase.packs.router_file import HeadName, LinearHead, RouterWeights, read_router
from modularbase.types import FloatArray

STATE_EPS = 1e-6


class Router:
    """The heads of a router pack. Immutable and thread-safe.

    Attributes:
        layer: What it takes are the states entering this layer of the base (`Engine.hidden`).
        pooling: How a text's states become one.
        packs: Those it knows.
    """

    def __init__(self, weights: RouterWeights) -> None:
        """Takes what a file holds; see `load`."""
        self.layer, self.pooling, self.packs = weights.layer, weights.pooling, weights.packs
        self._heads = dict(weights.heads)

    @classmethod
    def load(cls, path: Path) -> Router:
        """Reads a router pack.

        Raises:
            PackFormatError: The file is not a sound one.
        """
        return cls(read_router(path))

    def score(self, hidden: FloatArray) -> dict[str, float]:
        """How likely a text is one for each pack; what is missing from 1 is for none of them.

        Args:
            hidden: The text's pooled state [n_embd].

        Raises:
            InvalidRequestError: The pack has no router, or the state is of another width.
        """
        return self._shares("router", hidden)

    def mix(self, hidden: FloatArray) -> dict[str, float]:
        """The weights to blend all packs with for a text; their sum is 1.

        Args:
            hidden: The text's pooled state [n_embd].

        Raises:
            InvalidRequestError: The pack has no fusion weights, or the state is of another width.
        """
        return self._shares("fusion", hidden)

    def _shares(self, name: HeadName, hidden: FloatArray) -> dict[str, float]:
        head = self._heads.get(name)
        if head is None:
            raise InvalidRequestError("router", f"a pack with {name} weights", "one without")
        n_embd = head.weight.shape[1]
        if hidden.shape != (n_embd,):
            raise InvalidRequestError("hidden", f"a state of shape [{n_embd}]", str(hidden.shape))
        shares = softmax(head, normalised(hidden))
        return {pack.id: float(share) for pack, share in zip(self.packs, shares, strict=False)}


def normalised(hidden: FloatArray) -> FloatArray:
    """States divided by their root mean square over the last axis: layers differ in size."""
    wide = hidden.astype(np.float32)
    rms = np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + np.float32(STATE_EPS))
    found: FloatArray = wide / rms
    return found


def softmax(head: LinearHead, x: FloatArray) -> FloatArray:
    """A head's outputs for normalised states [..., n_embd]: [..., n_outputs]."""
    logits = (x @ head.weight.T + head.bias) / np.float32(head.temperature)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: FloatArray = shares / shares.sum(axis=-1, keepdims=True)
    return found
