"""What must hold of the keys and values of a conversation, whatever was done to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from modularbase import Engine
from modularbase.context.plan import TIER_CODES
from modularbase.context_types import Tier

BLOCK_TOKENS = 64
KEY, IMPORTANT, REDUNDANT = (TIER_CODES[tier] for tier in Tier)
# Which blocks a block is one of (KvTier in kernels/attention.h).
EXACT_BLOCKS, IMPORTANT_BLOCKS, SLOT_BLOCKS, DETAIL_BLOCKS = range(4)


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block of each kind over all layers, counted here and not by the engine."""

    exact: int
    kept: tuple[int, ...]  # of each kind, keys and values

    @classmethod
    def of(cls, engine: Engine, n_detail_heads: int) -> BlockBytes:
        info = engine.info
        n_values = 2 * info["head_dim"] * BLOCK_TOKENS  # of a head: keys and values
        scales = 2 * n_values // 32
        exact = 2 * n_values
        important = n_values // 2 + scales + 2 * info["head_dim"]
        slots = n_values + scales + 4 * BLOCK_TOKENS
        n_heads = info["n_layer"] * info["n_head_kv"]
        return cls(
            exact=info["kv_bytes"] // info["n_kv_blocks"],
            kept=(
                n_heads * exact,
                n_heads * important,
                (n_heads - n_detail_heads) * slots,
                n_detail_heads * important,
            ),
        )

    def of_block(self, kind: int) -> int:
        """What a block takes of the budget: exact ones may have mid rows beside keys and values."""
        return self.exact if kind == EXACT_BLOCKS else self.kept[kind]


def check_state(state: Any, block_bytes: BlockBytes, kv_bytes: int) -> None:
    """Asserts that what the engine tells of a conversation adds up.

    Args:
        state: What `context_state` gives.
        block_bytes: Of its engine.
        kv_bytes: The engine's budget.
    """
    assert 0 <= state.n_compacted <= state.n_tokens
    assert state.n_compacted % BLOCK_TOKENS == 0
    assert len(state.tiers) == state.n_compacted
    in_spans = [p for start, n, _ in state.spans for p in range(start, start + n)]
    assert in_spans == [p for p, code in enumerate(state.tiers) if code == REDUNDANT]
    least = -(-(state.n_tokens - state.n_compacted) // BLOCK_TOKENS)
    n_own, rest = divmod(state.own_bytes, block_bytes.exact)
    assert rest == 0 and n_own >= least
    by_tier = state.key_bytes + state.important_bytes + state.redundant_bytes + state.own_bytes
    assert by_tier == state.total_bytes <= kv_bytes


def check_image(image: Any, state: Any, block_bytes: BlockBytes) -> None:
    """Asserts that every token is kept once, where its tier says, and the bytes add up.

    Args:
        image: What `save_conversation` gives.
        state: What `context_state` gives of the same conversation.
        block_bytes: Of its engine.
    """
    assert (image.n_valid, image.n_positions) == (state.n_tokens, state.n_compacted)
    shown, detailed, n_slots = Counter[int](), Counter[int](), Counter[int]()
    n_bytes = Counter[int]()
    for kind, tier, visible, positions in image.blocks:
        n_bytes[tier] += block_bytes.of_block(kind)
        assert visible and visible.bit_length() <= len(positions)
        seen = [p for i, p in enumerate(positions) if visible >> i & 1]
        if kind == SLOT_BLOCKS:
            n_slots.update(seen)
        elif kind == DETAIL_BLOCKS:
            detailed.update(seen)
        else:
            assert all(a < b for a, b in pairwise(positions))
            # Among exact tokens some may wait until they fill a block of 4 bits.
            allowed = {tier, IMPORTANT} if kind == EXACT_BLOCKS else {tier}
            assert {image.tiers[p] for p in seen} <= allowed
            assert tier == (IMPORTANT if kind == IMPORTANT_BLOCKS else tier)
            shown.update(seen)
    assert shown == Counter(p for p, code in enumerate(image.tiers) if code != REDUNDANT)
    assert n_slots == Counter({start: n for start, _, n in image.spans if n})
    has_details = block_bytes.kept[DETAIL_BLOCKS] > 0
    summarised = (range(start, start + n) for start, n, wanted in image.spans if wanted)
    assert detailed == Counter(p for span in summarised for p in span if has_details)
    assert n_bytes == +Counter(
        {KEY: state.key_bytes, IMPORTANT: state.important_bytes, REDUNDANT: state.redundant_bytes}
    )
    n_own = -(-(image.n_valid - image.n_positions) // BLOCK_TOKENS)
    stored = sum(block_bytes.kept[kind] for kind, *_ in image.blocks)
    assert len(image.data) == stored + n_own * block_bytes.exact
