"""Conversations on the default base: tiers, their bytes, how near they are to an exact cache."""

from __future__ import annotations

import inspect
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from modularbase import Engine, EngineOptions, Tier
from modularbase.context_types import ContextOptions
from modularbase.types import KvKind, Message, Result

SOURCE = inspect.getsource(statistics)
# Of log-probabilities of likely tokens. Seen: 0.25, 0.36 and 0.39; where the past is
# another one, the tokens are others.
TOLERANCE = {"q8_0": 0.6, "q4_0": 0.8, "tiered": 0.8}

TALK = "We spoke about the weather, the garden, the bus that is late, and nothing else. " * 12


def turns() -> list[Message]:
    """Some 2,000 tokens: texts that 4 bits are enough for, one that can be spared, a question."""
    return [
        {"role": "user", "content": "Look at this.\n" + SOURCE[:3000], "tier": "important"},
        {"role": "user", "content": TALK, "tier": "redundant"},
        {"role": "user", "content": "Go on.\n" + SOURCE[3000:5500], "tier": "important"},
        {"role": "user", "content": "What is the median?"},
    ]


def talk_through(smollm2: Path, kv: KvKind, context: ContextOptions | None = None) -> list[Result]:
    with (
        Engine.load(smollm2, kv=kv, pack_budget=0, n_threads=2) as engine,
        engine.conversation(context=context) as talk,
    ):
        return [
            talk.chat(message, max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)
            for message in turns()
        ]


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> list[Result]:
    return talk_through(smollm2, "f16")


def largest_difference(found: Result, wanted: Result) -> float:
    """Of the log-probabilities of what is likely next; inf where another token was chosen."""
    assert found.logprobs is not None and wanted.logprobs is not None
    if found.token_ids != wanted.token_ids:
        return math.inf
    mine, theirs = found.logprobs[0].top, wanted.logprobs[0].top
    return max(abs(mine[token] - theirs[token]) for token in list(theirs)[:5] if token in mine)


@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_rounded(smollm2: Path, exact: list[Result], kv: KvKind) -> None:
    for found, wanted in zip(talk_through(smollm2, kv), exact, strict=True):
        assert largest_difference(found, wanted) < TOLERANCE[kv]


def test_tiered(smollm2: Path, exact: list[Result]) -> None:
    results = talk_through(smollm2, "tiered")
    for found, wanted in zip(results, exact, strict=True):
        assert largest_difference(found, wanted) < TOLERANCE["tiered"]
    report = results[-1].context
    assert report is not None
    assert report.tokens[Tier.REDUNDANT] > 100
    assert report.tokens[Tier.IMPORTANT] > 1000
    assert report.total_bytes < 0.5 * report.exact_bytes
    spared = [d for d in report.decisions if d.tier is Tier.REDUNDANT]
    assert all("weather" in d.text or "garden" in d.text or "bus" in d.text for d in spared)


def pass_key(
    base: Path, kv: KvKind, context: ContextOptions | None, options: EngineOptions | None = None
) -> Result:
    """What is answered to a question about the first message, which may be summarised."""
    told = f"{TALK[:250]} The pass key of the cellar is 482913. {TALK[:250]}"
    greedy: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    with (
        Engine.load(base, kv=kv, pack_budget=0, n_threads=2, options=options) as engine,
        engine.conversation(context=context) as talk,
    ):
        talk.chat({"role": "user", "content": told, "tier": "redundant"}, max_tokens=1, **greedy)
        text = "Look at this.\n" + SOURCE[:2500]
        talk.chat({"role": "user", "content": text}, max_tokens=1, **greedy)
        question = "What is the pass key of the cellar? Repeat the number."
        return talk.chat(question, max_tokens=20, **greedy)


def test_heads_that_keep_details_find_a_value_in_a_summary(smollm2: Path) -> None:
    assert "482913" in pass_key(smollm2, "f16", None).text
    found = pass_key(smollm2, "tiered", ContextOptions(rehydrate_tokens=0))
    assert "482913" in found.text
    assert found.context is not None and found.context.rehydrated_tokens == 0
    assert found.context.tokens[Tier.REDUNDANT] > 100


def test_what_slots_alone_lose_is_read_again(smollm2: Path) -> None:
    slots = EngineOptions(kv_detail_heads=())
    lost = pass_key(smollm2, "tiered", ContextOptions(rehydrate_tokens=0), slots)
    assert "482913" not in lost.text
    found = pass_key(smollm2, "tiered", ContextOptions(), slots)
    assert "482913" in found.text
    assert found.context is not None and 0 < found.context.rehydrated_tokens <= 128
