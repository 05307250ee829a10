"""What others do to a cache to make it smaller: rounded, or only some tokens kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

from benchmarks.context.rounding import Q4_0_BITS, Q8_0_BITS, q4_0, q8_0, rotate
from benchmarks.context.torch_model import LayerCache, Prefilled

F16_BITS = 16
SINKS = 4


class CacheMethod(Protocol):
    """Makes another cache of an exact one."""

    @property
    def name(self) -> str:
        """As tables have it."""

    def apply(self, context: Prefilled) -> tuple[Sequence[LayerCache], int]:
        """Returns the layers as they are held, and their bytes."""


@dataclass(frozen=True)
class Exact:
    """Keys and values in F16."""

    name: str = "F16"

    def apply(self, context: Prefilled) -> tuple[Sequence[LayerCache], int]:
        """See CacheMethod."""
        return list(map(_f16, context.layers)), _bytes(context.layers, F16_BITS)


@dataclass(frozen=True)
class Rounded:
    """All tokens in a type of ggml, as llama.cpp's `--cache-type-k` and `-v` have them.

    Attributes:
        kind: The type.
        is_rotated: Whether a Hadamard matrix is put before, as newer versions do.
    """

    kind: Literal["q8_0", "q4_0"]
    is_rotated: bool = False

    @property
    def name(self) -> str:
        """See CacheMethod."""
        return f"{self.kind.upper()}{', rotated' if self.is_rotated else ''}"

    def apply(self, context: Prefilled) -> tuple[Sequence[LayerCache], int]:
        """See CacheMethod."""
        bits = {"q8_0": Q8_0_BITS, "q4_0": Q4_0_BITS}[self.kind]
        held = [
            LayerCache(self._rounded(layer.keys), self._rounded(layer.values))
            for layer in context.layers
        ]
        return held, _bytes(context.layers, bits)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        rounding = {"q8_0": q8_0, "q4_0": q4_0}[self.kind]
        # llama.cpp rounds what was F32.
        return rotate(rounding(rotate(rows))) if self.is_rotated else rounding(rows)


@dataclass(frozen=True)
class Window:
    """StreamingLLM (2309.17453): the first tokens and the last, in F16.

    Attributes:
        ratio: By how much the cache shrinks.
    """

    ratio: float

    @property
    def name(self) -> str:
        """See CacheMethod."""
        return f"window + sinks, {self.ratio:g}x"

    def apply(self, context: Prefilled) -> tuple[Sequence[LayerCache], int]:
        """See CacheMethod."""
        kept = kept_ends(len(context.ids), self.ratio)
        held = [
            LayerCache(_halves(layer.keys[:, kept]), _halves(layer.values[:, kept]))
            for layer in context.layers
        ]
        return held, _bytes(held, F16_BITS)


@dataclass(frozen=True)
class SnapKV:
    """SnapKV (2404.14469): what the last queries attend to, chosen by each head, in F16.

    The score of a token is the attention it gets from the last queries, averaged over them and over
    the heads that share keys, then the largest of its neighbourhood.

    Attributes:
        ratio: By how much the cache shrinks.
        n_queries: The last ones; their tokens are kept.
        neighbourhood: Tokens, odd.
    """

    ratio: float
    n_queries: int = 32
    neighbourhood: int = 7

    @property
    def name(self) -> str:
        """See CacheMethod."""
        return f"SnapKV, {self.ratio:g}x"

    def apply(self, context: Prefilled) -> tuple[Sequence[LayerCache], int]:
        """See CacheMethod."""
        n_kept = n_kept_tokens(len(context.ids), self.ratio)
        pairs = zip(context.layers, context.queries, strict=True)
        held = [self._selected(layer, queries, n_kept) for layer, queries in pairs]
        return held, _bytes(held, F16_BITS)

    def _selected(self, layer: LayerCache, queries: torch.Tensor, n_kept: int) -> LayerCache:
        n_head_kv, n_tokens, head_dim = layer.keys.shape
        n_last = min(self.n_queries, n_kept // 2)
        last = queries[:, -n_last:].reshape(n_head_kv, -1, head_dim)
        scores = (last @ layer.keys.mT / head_dim**0.5).view(n_head_kv, -1, n_last, n_tokens)
        later = torch.ones(n_last, n_tokens, dtype=torch.bool).triu(n_tokens - n_last + 1)
        shares = scores.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(1, 2))
        side = self.neighbourhood // 2
        pooled = functional.max_pool1d(shares, self.neighbourhood, stride=1, padding=side)
        pooled[:, -n_last:] = torch.inf
        chosen = pooled.topk(n_kept, dim=-1).indices.sort(dim=-1).values
        index = chosen[..., None].expand(-1, -1, head_dim)
        return LayerCache(
            _halves(layer.keys.gather(1, index)), _halves(layer.values.gather(1, index))
        )


def n_kept_tokens(n_tokens: int, ratio: float) -> int:
    """How many tokens in F16 take the part of the memory."""
    return min(n_tokens, max(2 * SINKS, round(n_tokens / ratio)))


def kept_ends(n_tokens: int, ratio: float) -> list[int]:
    """Indices of the first tokens, and of as many last ones as fit."""
    n_last = n_kept_tokens(n_tokens, ratio) - SINKS
    return [*range(SINKS), *range(n_tokens - n_last, n_tokens)]


def _f16(layer: LayerCache) -> LayerCache:
    return LayerCache(_halves(layer.keys), _halves(layer.values))


def _halves(rows: torch.Tensor) -> torch.Tensor:
    return rows.half().float()


def _bytes(layers: Sequence[LayerCache], bits: float) -> int:
    n_values: int = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    return round(n_values * bits / 8)
