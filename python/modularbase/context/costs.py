"""What a token of each tier takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modularbase.errors import BaseLoadError

# 4 bits and a scale (F16) for every 32 of keys and values, and the keys' and values' mean (F16) for
# every 64 tokens, which a half of it pays on average.
_IMPORTANT_BITS = 4.625
_EXACT_BYTES = 2
_SLOT_BITS = 8.5  # 8, and a scale (F16) for every 32
_LOG_WEIGHT_BYTES = 4


@dataclass(frozen=True, slots=True)
class TierCosts:
    """Bytes over all layers and heads.

    Attributes:
        key_token_bytes: Of a token that is kept exactly.
        important_token_bytes: Of one in 4 bits; a whole number of bytes only for many tokens.
        slot_bytes: Of a slot of a summary, its key, value and log weight, of the heads that have
            slots.
        detail_token_bytes: Of a summarised token, of the heads that keep it in 4 bits instead.
    """

    key_token_bytes: int
    important_token_bytes: float
    slot_bytes: int
    detail_token_bytes: float = 0.0

    @classmethod
    def of_shape(
        cls, n_layer: int, n_head_kv: int, head_dim: int, n_detail_head: int = 0
    ) -> TierCosts:
        """The costs of a base of this shape."""
        n_head = n_layer * n_head_kv
        n_values = 2 * head_dim  # keys and values of a head
        exact = n_values * _EXACT_BYTES
        important = n_values * _IMPORTANT_BITS / 8
        slot = round(n_values * _SLOT_BITS / 8) + _LOG_WEIGHT_BYTES
        return cls(
            n_head * exact,
            n_head * important,
            (n_head - n_detail_head) * slot,
            n_detail_head * important,
        )

    def summary_bytes(self, n_tokens: int, n_slots: int) -> float:
        """Of so many tokens and the slots that stand for them."""
        return n_slots * self.slot_bytes + n_tokens * self.detail_token_bytes

    @classmethod
    def from_metadata(
        cls, file: str, metadata: Mapping[str, object], n_detail_head: int = 0
    ) -> TierCosts:
        """The costs of a base by its file's metadata, and how many KV heads keep details.

        Raises:
            BaseLoadError: The metadata does not tell the shape.
        """
        family = metadata.get("general.architecture")

        def number(name: str, default: int | None = None) -> int:
            key = f"{family}.{name}"
            value = metadata.get(key, default)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BaseLoadError(file, key, "a positive whole number", repr(value))
            return value

        n_head = number("attention.head_count")
        head_dim = number("attention.key_length", number("embedding_length") // n_head)
        return cls.of_shape(
            number("block_count"),
            number("attention.head_count_kv", n_head),
            head_dim,
            n_detail_head,
        )
