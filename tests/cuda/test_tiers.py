"""Contexts in tiers on a GPU against the same on the CPU, with ggml's ops there, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modularbase import Engine, EngineOptions
from modularbase.context_types import Tier
from modularbase.types import KvKind, Message
from tests.tools.tiny_requests import ids

# F32 weights: only the order of sums differs, until keys and values are rounded: what lies between
# two steps falls to either. With 4 bits, 16 steps, that moved single log-probabilities by up to
# 0.07 between two ways of computing on a CPU; a tier left out moves them by more than 0.3.
TOLERANCE: dict[KvKind, float] = {"q8_0": 2e-2, "q4_0": 0.1, "tiered": 0.1}
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
CHATTER = "so many words about the weather and the garden and the long way home today "


def load(path: Path, device: Any, kv: KvKind) -> Engine:
    options = EngineOptions(pack_budget_bytes=0, attention="reference", kv_detail_heads=((1, 0),))
    return Engine.load(path, device=device, dtype="keep", n_threads=2, kv=kv, options=options)


@pytest.fixture
def both(wide_model: Path, kv: KvKind) -> Iterator[tuple[Engine, Engine]]:
    """An engine on the GPU and one on the CPU."""
    with load(wide_model, "cuda", kv) as on_gpu, load(wide_model, "cpu", kv) as on_cpu:
        yield on_gpu, on_cpu


def first_logprob(result: Any) -> float:
    return float(result.logprobs[0].logprob)


@pytest.mark.parametrize("kv", ["q8_0", "q4_0", "tiered"])
def test_a_long_prompt(both: tuple[Engine, Engine], kv: KvKind) -> None:
    """The second token is the first behind a compaction."""
    found, expected = (
        [t.logprob for t in e.generate(ids(900, seed=2), max_tokens=2, **GREEDY).logprobs or []]
        for e in both
    )
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[kv])


@pytest.mark.parametrize("kv", ["tiered"])
def test_a_conversation_with_slots(both: tuple[Engine, Engine], kv: KvKind, tmp_path: Path) -> None:
    gpu, cpu = both
    turns: list[Message] = [
        {"role": "user", "content": CHATTER * 16, "tier": "redundant"},
        *({"role": "user", "content": CHATTER * 4} for _ in range(4)),
    ]
    with gpu.conversation() as talk, cpu.conversation() as other, cpu.conversation() as restored:
        for turn in turns:
            found = talk.chat(turn, max_tokens=1, **GREEDY)
            expected = other.chat(turn, max_tokens=1, **GREEDY)
            assert abs(first_logprob(found) - first_logprob(expected)) < TOLERANCE[kv]
        assert found.context is not None and expected.context is not None
        assert found.context.tokens == expected.context.tokens
        assert found.context.tokens[Tier.REDUNDANT] > 0

        talk.save(tmp_path / "talk.mbconv")
        restored.restore(tmp_path / "talk.mbconv")
        found = talk.chat("and?", max_tokens=1, **GREEDY)
        expected = restored.chat("and?", max_tokens=1, **GREEDY)
        assert expected.usage.cached_tokens == found.usage.cached_tokens
        # From here on both have the same blocks, bit for bit.
        assert abs(first_logprob(found) - first_logprob(expected)) < 1e-2


@pytest.mark.parametrize("kv", ["q4_0"])
def test_compacted_pasts_in_a_batch(both: tuple[Engine, Engine], kv: KvKind) -> None:
    """Products of other shapes round otherwise, keys and values then fall otherwise."""
    gpu = both[0]
    params: dict[str, Any] = {"max_tokens": 2, **GREEDY}
    prompts = [ids(600 + 50 * i, seed=i) for i in range(3)]
    alone = [gpu.generate(prompt, **params) for prompt in prompts]
    running = [gpu.submit(prompt, **params) for prompt in prompts]
    together = [generation.result(300) for generation in running]
    for found, expected in zip(together, alone, strict=True):
        assert abs(first_logprob(found) - first_logprob(expected)) < TOLERANCE[kv]
