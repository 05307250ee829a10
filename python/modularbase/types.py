"""The values that cross the public interface: parameters in, results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from modularbase.context_types import ContextReport

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


KvKind: TypeAlias = Literal["f16", "bf16", "q8_0", "q4_0", "tiered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is set up beyond the arguments of `Engine.load`.

    Attributes:
        kv: How keys and values are kept: 16 bits, 8 bits, or in 4 bits behind the last
            kv_window_tokens ("q4_0"); "tiered" keeps key tokens exactly, others in 4 bits, and what
            a conversation can spare as a summary.
        kv_window_tokens: The last tokens of a sequence, which "q4_0" and "tiered" keep exactly; at
            least 128.
        kv_detail_heads: KV heads, as (layer, head), of which "tiered" keeps in 4 bits what it
            summarises of others; None takes those that the catalogue knows of the base.
        kv_budget_bytes: Memory for the KV cache; 0 gives room for two sequences of n_ctx tokens in
            16 bits.
        pack_budget_bytes: Memory for packs; 0 makes an engine without packs.
        first_site: The lowest layer that packs are expected at: layers up to it share their KV
            between packs. -1 is the middle layer.
        n_batch: Most rows of one forward pass.
        n_sequences: Most requests running at once.
        attention: Our fused kernel, or ggml's ops (slower; the kernel's oracle).
        linear: The same choice for matrix products of 16- and 32-bit weights.
        sites: The same choice for packs.
        head: The output head by certified shortlist, or as the full product; the tokens are the
            same.
        prefix_cache: Whether KV of earlier prompts is reused.
    """

    kv: KvKind = "f16"
    kv_window_tokens: int = 128
    kv_detail_heads: tuple[tuple[int, int], ...] | None = None
    kv_budget_bytes: int = 0
    pack_budget_bytes: int = 256 << 20
    first_site: int = -1
    n_batch: int = 512
    n_sequences: int = 64
    attention: Literal["fused", "reference"] = "fused"
    linear: Literal["fused", "reference"] = "fused"
    sites: Literal["fused", "reference"] = "fused"
    head: Literal["certified", "full"] = "certified"
    prefix_cache: Literal["on", "off"] = "on"


MergePolicy: TypeAlias = Literal["blend", "best", "priority", "ties"]


@dataclass(frozen=True, slots=True)
class PackUse:
    """One pack of a request.

    Attributes:
        pack: "python_code", "python_code@1.0.0" or "python_code@>=1,<2".
        weight: Factor of what it adds, 0 or more; of several packs, each has its own.
    """

    pack: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackRequest:
    """Which packs a request runs with, and how.

    Attributes:
        packs: At most four; none is the plain base.
        policy: How several are joined at every token: "blend" adds all by weight; "best" keeps the
            one with the largest weight x token gate, "priority" the first whose token gate is open;
            "ties" elects a sign for every element (arXiv:2306.01708).
        activation: "prompt": they act on all tokens. "from_here": from the prompt's last token on,
            so that KV of the prompt is the plain base's, whichever packs come after it.
        fallback: When a pack cannot be had, its manifest's fallback chain, the engine's default
            packs and at last the plain base are tried, and the result says so. "on_failure": for
            packs that are known; "always": for unknown ones, too; "never": it is an error.
        user: Whose history this request is part of (see `modularbase.routing`); "": nobody's.
    """

    packs: tuple[PackUse, ...] = ()
    policy: MergePolicy = "blend"
    activation: Literal["prompt", "from_here"] = "prompt"
    fallback: Literal["on_failure", "always", "never"] = "on_failure"
    user: str = ""


Packs: TypeAlias = str | Sequence[str | PackUse] | PackRequest | None


@dataclass(frozen=True, slots=True)
class UsedPack:
    """A pack that a result was made with."""

    id: str
    version: str
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Fallback:
    """Packs that could not be had."""

    packs: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class PackSwitch:
    """A generation of a pack that a running request left for the one that replaced it.

    From there on the request's keys and values are of several generations.

    Attributes:
        token_index: Of the first generated token that was computed with the new one.
        from_digest: The generation it left.
        to_digest: The generation it went on with.
    """

    token_index: int
    from_digest: str
    to_digest: str


@dataclass(frozen=True, slots=True)
class PackStatus:
    """What an engine knows of one generation of a pack.

    Attributes:
        id: Its name in this engine.
        version: Of its manifest.
        digest: "sha256:" and the digest of its file, or "xxh64:" and that of what a channel
            published: the generation.
        path: The file, or the shared-memory segment.
        state: "known" (on disk, or beside the slots), "loading" or "resident".
        n_bytes: What it takes of the budget when resident.
        slot: Where it lies, or None.
        n_leases: Running requests that hold it.
        is_pinned: Never evicted.
        is_retired: Replaced, and kept for the requests that still hold it.
        n_hits: Requests that have used it.
        n_loads: Times it was copied into a slot.
        idle_s: Since it was last used, or None.
        verify_us: Time for checking the file, once.
        load_us: Time of the last copy into a slot.
        last_error: Why the last load failed, or "".
    """

    id: str
    version: str
    digest: str
    path: str
    state: Literal["known", "loading", "resident"]
    n_bytes: int
    slot: int | None
    n_leases: int
    is_pinned: bool
    is_retired: bool
    n_hits: int
    n_loads: int
    idle_s: float | None
    verify_us: float
    load_us: float
    last_error: str


OnPublish: TypeAlias = Literal["new_requests", "live"]


@dataclass(frozen=True, slots=True)
class AttachmentStatus:
    """What an engine knows of a channel that a trainer publishes a pack through.

    Attributes:
        name: The pack's name in this engine.
        channel: The shared-memory segment.
        on_publish: Who gets a new generation.
        is_live: Whether more generations may come.
        generation: Number, in the channel, of the one the name means; 0 before the first.
        digest: Of that one, or "".
        is_identity: Whether that one changes nothing, as one does that was not trained yet.
        n_published_seen: The newest number that was seen.
        n_failed: Generations that could not be used.
        n_switched: Running requests that were moved to a new one ("live").
        ready_ms: From seeing the newest one to the name meaning it.
        last_error: What went wrong last, or "".
    """

    name: str
    channel: str
    on_publish: OnPublish
    is_live: bool
    generation: int
    digest: str
    is_identity: bool
    n_published_seen: int
    n_failed: int
    n_switched: int
    ready_ms: float
    last_error: str


@dataclass(frozen=True, slots=True)
class PackStats:
    """An engine's budget for packs, and what happened to it since it was loaded."""

    budget_bytes: int
    used_bytes: int
    n_loads: int
    n_evictions: int
    n_failed_loads: int
    n_preloads: int
    n_preload_hits: int
    n_preload_wastes: int


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
    packs: tuple[UsedPack, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    # Layer -> mean cosine between what packs add there; below 0 they work against each other.
    pack_conflict: Mapping[int, float] = field(default_factory=dict)
    # Generations that replaced those in `packs` while it ran (`Engine.attach` with "live").
    pack_switches: tuple[PackSwitch, ...] = ()
    # What is kept of its context, and how; None where it was not graded, or nobody knows any more.
    context: ContextReport | None = None


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
