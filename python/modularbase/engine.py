"""The engine as Python sees it: a base in memory that answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

from modularbase import _core
from modularbase.bases import install
from modularbase.bases.identity import BaseIdentity
from modularbase.bases.text_stream import StopMatcher
from modularbase.byte_sizes import parse_bytes
from modularbase.context.chat import Chat, Sectioned, split_tiers
from modularbase.context.costs import TierCosts
from modularbase.context.prompt import ids_prompt, text_prompt
from modularbase.context_types import ContextOptions
from modularbase.conversation import Conversation
from modularbase.conversation_file import Layout
from modularbase.conversation_host import Host, Turn
from modularbase.errors import InvalidRequestError
from modularbase.generation import Generation, Ticket
from modularbase.gguf_file import read_metadata
from modularbase.pack_requests import Predictor
from modularbase.request_context import RequestContext
from modularbase.request_specs import (
    assign,
    chosen_params,
    fill_spec,
    positive,
    stop_strings,
    token_ids,
)
from modularbase.resident_base import ResidentBase
from modularbase.types import (
    EngineOptions,
    KvKind,
    Message,
    Packs,
    Prompt,
    Result,
    SamplingParams,
)


def build_info() -> dict[str, object]:
    """What the C++ runtime was built with and uses here."""
    return {"ggml": _core.ggml_version, "cpu_features": _core.cpu_features()}


class Engine(ResidentBase):
    """A resident base that serves requests from any thread.

    Use it as a context manager, or call `close`.
    """

    @classmethod
    def load(
        cls,
        base: str | os.PathLike[str],
        *,
        dtype: Literal["auto", "keep", "f16", "bf16", "f32"] = "auto",
        n_threads: int | None = None,
        n_ctx: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        kv: KvKind | None = None,
        kv_budget: int | str | None = None,
        pack_budget: int | str | None = None,
        default_packs: Sequence[str] = (),
        predictor: Predictor | None = None,
        options: EngineOptions | None = None,
    ) -> Engine:
        """Loads a base into memory.

        Args:
            base: A name from the catalogue (installed when need be) or the path of a GGUF file.
            dtype: Type the matrices are held in. "auto" keeps quantised files as they are and
                holds 16- and 32-bit ones in BF16 where the CPU multiplies it natively, else F16;
                "keep" changes nothing.
            n_threads: Compute threads; None takes one per core.
            n_ctx: Longest sequence in tokens; None takes what the base was trained for, at most
                32768.
            device: Where to compute.
            kv: How keys and values are kept, see `EngineOptions`; None takes options.kv.
            kv_budget: Memory for them, in bytes or as "64MB"; None takes options.kv_budget_bytes.
            pack_budget: Memory for resident packs, in bytes or as "256MB"; 0 for an engine without
                packs; None takes options.pack_budget_bytes.
            default_packs: What answers, blended, where a pack and its own fallbacks fail.
            predictor: Preloads what it expects next (`modularbase.routing.PackPredictor`).
            options: What is rarely changed.

        Raises:
            BaseNotFoundError: No such name or file.
            BaseLoadError: The file cannot be used.
            InvalidRequestError: An argument makes no sense.
            DeviceError: The device is not there or has too little memory.
        """
        path = install.resolve(os.fsdecode(base), install=True)
        raw = _core.EngineOptions()
        for field in fields(EngineOptions):
            value = getattr(options or EngineOptions(), field.name)
            if value is not None or field.name != "kv_detail_heads":
                assign(raw, field.name, value)
        assign(raw, "dtype", dtype)
        assign(raw, "device", device)
        raw.n_threads = 0 if n_threads is None else positive("n_threads", n_threads)
        raw.n_ctx = 0 if n_ctx is None else positive("n_ctx", n_ctx)
        if kv is not None:
            assign(raw, "kv", kv)
        if kv_budget is not None:
            raw.kv_budget_bytes = parse_bytes("kv_budget", kv_budget)
        if pack_budget is not None:
            raw.pack_budget_bytes = parse_bytes("pack_budget", pack_budget)
        metadata = read_metadata(path)
        if options is None or options.kv_detail_heads is None:
            raw.kv_detail_heads = BaseIdentity(path, metadata).detail_heads
        return cls(path, metadata, raw, default_packs, predictor)

    def __enter__(self) -> Engine:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the engine."""
        self.close()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        packs: Packs = None,
        context: ContextOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Queues a generation and returns; a pack's first use loads and checks it here.

        Args:
            prompt: Text (special tokens in it count) or token ids.
            params: How tokens are chosen.
            packs: Names of packs, or a `PackRequest`; none is the plain base.
            context: How the prompt is graded, for an engine with kv="tiered"; None keeps it as
                kv="q4_0" does. Text is graded like a user's message; ids have no floors. Where
                something becomes a summary, the prompt is read before, which counts as cached, and
                the answer begins when the result or its text is waited for. See `Result.context`.
            **overrides: Fields of `SamplingParams`, over those of params.

        Raises:
            InvalidRequestError: The prompt is empty, a parameter makes no sense, or a context was
                given, and the engine keeps none in tiers.
            ContextBudgetError: The context's budget is too small for what must be kept.
            ContextLengthError: Prompt and max_tokens exceed the context.
            KvCacheFullError: The request could never fit the KV cache.
            PackNotFoundError: A pack is not installed.
            ModularBaseError: A pack cannot be had, and the request allows no fallback.
        """
        chosen = chosen_params(params, overrides)
        if context is None:
            return self._submitted(self._spec(self._token_ids(prompt), chosen), chosen, packs)
        graded = (
            text_prompt(prompt, self.tokenizer)
            if isinstance(prompt, str)
            else ids_prompt(token_ids(prompt))
        )
        return self._submit_graded(graded, chosen, packs, context)

    def submit_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        packs: Packs = None,
        context: ContextOptions | None = None,
        **overrides: Any,
    ) -> Generation:
        """Queues the next message of a conversation and returns.

        Args:
            messages: What was said; with kv="tiered" each may have a "tier" of its own.
            params: How tokens are chosen.
            packs: As in `submit`.
            context: As in `submit`, graded by messages; None takes the defaults if any message has
                a tier.
            **overrides: Fields of `SamplingParams`, over those of params.

        Raises:
            ChatTemplateError: The file has no usable template, or it raised.
            ModularBaseError: As `submit`; a message or its tier may be malformed, too.
        """
        bare, tiers = split_tiers(messages)
        if context is None and not (self._has_tiers and any(tiers)):
            return self.submit(self.chat_prompt(bare), params, packs=packs, **overrides)
        chat = Chat(self.chat_template, self.tokenizer)
        chat.add_messages(messages)
        chosen = chosen_params(params, overrides)
        return self._submit_graded(chat, chosen, packs, context or ContextOptions())

    def _submit_graded(
        self, prompt: Sectioned, params: SamplingParams, packs: Packs, options: ContextOptions
    ) -> Generation:
        self._expect_tiers()
        spec = self._spec(list(prompt.token_ids), params)
        context = RequestContext(self._core, self._tier_costs, prompt, options)
        try:
            spec.conversation = context.conversation
            spec.set_tiers(context.tiers)
            return self._submitted(spec, params, packs, context)
        except BaseException:
            context.settle()
            raise

    def _submit_turn(self, turn: Turn) -> Generation:
        spec = self._spec(list(turn.token_ids), turn.params)
        spec.conversation = turn.conversation
        spec.set_tiers(turn.tiers)
        spec.rehydrate = list(turn.rehydrate)
        return self._submitted(spec, turn.params, turn.packs)

    def _submitted(
        self,
        spec: _core.RequestSpec,
        chosen: SamplingParams,
        packs: Packs,
        context: RequestContext | None = None,
    ) -> Generation:
        # All that may be refused comes before the request runs.
        matcher = StopMatcher(stop_strings(chosen.stop))
        tokenizer = self.tokenizer
        prepared = self._add_packs(spec, packs, chosen.timeout_s)
        ticket: Ticket = (
            context.submit(lambda: self._core.submit(spec)) if context else self._core.submit(spec)
        )
        generation = Generation(ticket, tokenizer, matcher, chosen, prepared, context)
        if prepared.request.packs:  # only now: a guess must not push out what this one needs
            try:
                self._preparer.predict(prepared.request)
            except BaseException:
                generation.cancel()
                raise
        return generation

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """Generates until a stop and returns the whole result; arguments as in `submit`."""
        return self.submit(prompt, params, **overrides).result()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Iterator[str]:
        """Yields the text as it comes; leaving the loop cancels. Arguments as in `submit`."""
        generation = self.submit(prompt, params, **overrides)
        try:
            for piece in generation:
                if piece.text:
                    yield piece.text
            generation.result()  # an engine closed meanwhile is an error, not a shorter text
        finally:
            generation.cancel()

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Renders messages with the base's chat template and encodes them.

        Raises:
            ChatTemplateError: The file has no usable template, or it raised.
            InvalidRequestError: The messages are malformed, or the tier of one.
        """
        bare, _ = split_tiers(messages)
        return self.tokenizer.encode_chat(self.chat_template.render(bare))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """Generates the next message of a conversation; arguments as in `submit_chat`."""
        return self.submit_chat(messages, params, **overrides).result()

    def conversation(
        self, *, context: ContextOptions | None = None, packs: Packs = None
    ) -> Conversation:
        """Begins a dialogue whose keys and values stay in the engine from turn to turn.

        Args:
            context: How its context is graded, for an engine with kv="tiered"; None takes the
                defaults.
            packs: As in `submit`, for all turns.

        Raises:
            ChatTemplateError: The base has no usable chat template.
            InvalidRequestError: A context was given, and the engine keeps none in tiers.
        """
        if context is not None:
            self._expect_tiers()
        options = (context or ContextOptions()) if self._has_tiers else None
        return Conversation(self._host, options, packs)

    @property
    def _has_tiers(self) -> bool:
        return self._raw_options.kv == "tiered"

    def _expect_tiers(self) -> None:
        if not self._has_tiers:
            found = f"kv={self._raw_options.kv!r}"
            raise InvalidRequestError("context", 'an engine with kv="tiered"', found)

    @cached_property
    def _tier_costs(self) -> TierCosts:
        n_detail_head = len(set(self._raw_options.kv_detail_heads))
        return TierCosts.from_metadata(str(self._path), self._metadata, n_detail_head)

    @cached_property
    def _host(self) -> Host:
        info = self.info
        return Host(
            self._core,
            self._submit_turn,
            _core.ConversationImage,
            self.chat_template,
            self.tokenizer,
            self.base,
            self._tier_costs,
            Layout(
                kv=self._raw_options.kv,
                n_layer=info["n_layer"],
                n_head_kv=info["n_head_kv"],
                head_dim=info["head_dim"],
                first_site=info["first_site"],
                detail_heads=self._raw_options.kv_detail_heads,
                in_rows=info["kv_in_rows"],
            ),
            min(info["n_ctx"], info["n_kv_tokens"]),
        )

    def _spec(self, ids: list[int], params: SamplingParams) -> _core.RequestSpec:
        spec = _core.RequestSpec()
        spec.prompt = ids
        fill_spec(spec, params, self.tokenizer.eog_ids)
        return spec
