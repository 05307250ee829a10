"""The values that cross the public interface: parameters in, results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, object]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "deadline"]
FloatArray: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen. Defaults and order of the steps are llama.cpp's.

    Attributes:
        max_tokens: Most tokens to generate; None means until a stop or the end of the context.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set whose probability reaches top_p; 1 keeps all.
        min_p: Drop tokens less likely than min_p times the most likely one; 0 keeps all.
        typical_p: Locally typical sampling (arXiv:2202.00666); 1 turns it off.
        repeat_penalty: Divides the logits of recent tokens; 1 turns it off.
        repeat_last_n: How many recent tokens the penalties look at.
        frequency_penalty: Subtracted from a recent token's logit once per occurrence.
        presence_penalty: Subtracted once from the logit of every recent token.
        logit_bias: Added to the logits of these token ids.
        seed: Equal seeds give equal tokens; None draws one.
        stop: Generation ends before any of these strings.
        ignore_eos: Go on after an end-of-generation token.
        logprobs: Return the log-probability of each token and of the n most likely ones.
        n_draft: Most tokens drafted per step by prompt lookup; 0 turns speculation off. The tokens
            are the same.
        timeout_s: Give up after this many seconds (finish_reason "deadline").
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n_draft: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is set up beyond the arguments of `Engine.load`.

    Attributes:
        kv_type: Type of cached keys and values.
        kv_budget_bytes: Memory for the KV cache; 0 gives room for two sequences of n_ctx.
        pack_budget_bytes: Memory for packs; 0 makes an engine without packs.
        first_site: The lowest layer that packs are expected at: layers up to it share their KV
            between packs. -1 is the middle layer.
        n_batch: Most rows of one forward pass.
        n_sequences: Most requests running at once.
        attention: Our fused kernel, or ggml's ops (slower; the kernel's oracle).
        linear: The same choice for matrix products of 16- and 32-bit weights.
        head: The output head by certified shortlist, or as the full product; the tokens are the
            same.
        prefix_cache: Whether KV of earlier prompts is reused.
    """

    kv_type: Literal["f16", "bf16"] = "f16"
    kv_budget_bytes: int = 0
    pack_budget_bytes: int = 256 << 20
    first_site: int = -1
    n_batch: int = 512
    n_sequences: int = 64
    attention: Literal["fused", "reference"] = "fused"
    linear: Literal["fused", "reference"] = "fused"
    head: Literal["certified", "full"] = "certified"
    prefix_cache: Literal["on", "off"] = "on"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of prompt_tokens, taken from the prefix cache
    cached_lower_tokens: int = 0  # of prompt_tokens, known to the layers up to the first site
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went; all measured by the engine thread."""

    queue_ms: float  # submitted -> first step
    prefill_ms: float  # first step -> first token
    decode_ms: float  # first token -> last token
    prefill_tps: float  # computed prompt tokens per second
    decode_tps: float  # tokens after the first per second

    @property
    def ttft_ms(self) -> float:
        """Submitted -> first token."""
        return self.queue_ms + self.prefill_ms


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One generated token's log-probability and the most likely alternatives."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the base finds a text."""

    token_ids: list[int]
    logprobs: FloatArray  # [len(token_ids) - 1]: of token_ids[1:]
    perplexity: float


@dataclass(frozen=True, slots=True)
class Piece:
    """A streamed piece of text; joined, the pieces are the result's text."""

    text: str
    token_ids: list[int]
