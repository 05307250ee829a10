"""Systems that hold a context in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.context.cache_methods import CacheMethod, Exact, kept_ends
from benchmarks.context.systems import TierName
from benchmarks.context.torch_model import LayerCache, TorchModel
from modularbase.types import FloatArray


@dataclass(frozen=True)
class TorchContext:
    """A cache behind which the model goes on.

    Attributes:
        model: The model.
        layers: The cache.
        n_positions: The next token's position.
        n_bytes: Of the cache, in the form that it stands for.
    """

    model: TorchModel
    layers: Sequence[LayerCache]
    n_positions: int
    n_bytes: int

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """See HeldContext."""
        found: FloatArray = self.model.logits(self.layers, ids, self.n_positions).numpy()
        return found

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """See HeldContext."""
        return self.model.generate(self.layers, ids, self.n_positions, max_tokens)


@dataclass(frozen=True)
class MethodSystem:
    """The whole context is read exactly, then its cache is made smaller."""

    model: TorchModel
    method: CacheMethod
    heeded_tiers: Sequence[TierName] = ()

    @property
    def name(self) -> str:
        """See ContextSystem."""
        return self.method.name

    def hold(self, ids: Sequence[int], tiers: Sequence[TierName] | None = None) -> TorchContext:
        """See ContextSystem."""
        del tiers
        layers, n_bytes = self.method.apply(self.model.prefill(ids))
        return TorchContext(self.model, layers, len(ids), n_bytes)


@dataclass(frozen=True)
class DroppedText:
    """The middle of the text is left out before it is read, so that the rest takes the part.

    Attributes:
        model: The model.
        ratio: By how much the cache shrinks.
    """

    model: TorchModel
    ratio: float
    heeded_tiers: Sequence[TierName] = ()

    @property
    def name(self) -> str:
        """See ContextSystem."""
        return f"text dropped, {self.ratio:g}x"

    def hold(self, ids: Sequence[int], tiers: Sequence[TierName] | None = None) -> TorchContext:
        """See ContextSystem."""
        del tiers
        kept = [ids[index] for index in kept_ends(len(ids), self.ratio)]
        layers, n_bytes = Exact().apply(self.model.read(kept))
        return TorchContext(self.model, layers, len(kept), n_bytes)
