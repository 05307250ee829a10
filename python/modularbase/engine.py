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
from modularbase.context.costs import TierCosts
from modularbase.context_types import ContextOptions
from modularbase.conversation import Conversation, Host, Turn
from modularbase.conversation_file import Layout
from modularbase.errors import InvalidRequestError
from modularbase.generation import Generation
from modularbase.gguf_file import read_metadata
from modularbase.pack_requests import Predictor
from modularbase.request_specs import (
    assign,
    chosen_params,
    fill_spec,
    positive,
    stop_strings,
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
            if value is not None or field.name != "kv_detail_layers":
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
        if options is None or options.kv_detail_layers is None:
            raw.kv_detail_layers = BaseIdentity(path, metadata).detail_layers
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
        **overrides: Any,
    ) -> Generation:
        """Queues a generation and returns; a pack's first use loads and checks it here.

        Args:
            prompt: Text (special tokens in it count) or token ids.
            params: How tokens are chosen.
            packs: Names of packs, or a `PackRequest`; none is the plain base.
            **overrides: Fields of `SamplingParams`, over those of params.

        Raises:
            InvalidRequestError: The prompt is empty, or a parameter makes no sense.
            ContextLengthError: Prompt and max_tokens exceed the context.
            KvCacheFullError: The request could never fit the KV cache.
            PackNotFoundError: A pack is not installed.
            ModularBaseError: A pack cannot be had, and the request allows no fallback.
        """
        chosen = chosen_params(params, overrides)
        return self._submitted(self._spec(self._token_ids(prompt), chosen), chosen, packs)

    def _submit_turn(self, turn: Turn) -> Generation:
        spec = self._spec(list(turn.token_ids), turn.params)
        spec.conversation = turn.conversation
        spec.set_tiers(turn.tiers)
        spec.rehydrate = list(turn.rehydrate)
        return self._submitted(spec, turn.params, turn.packs)

    def _submitted(
        self, spec: _core.RequestSpec, chosen: SamplingParams, packs: Packs
    ) -> Generation:
        # All that may be refused comes before the request runs.
        matcher = StopMatcher(stop_strings(chosen.stop))
        tokenizer = self.tokenizer
        prepared = self._add_packs(spec, packs, chosen.timeout_s)
        generation = Generation(self._core.submit(spec), tokenizer, matcher, chosen, prepared)
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
            InvalidRequestError: The messages are malformed.
        """
        return self.tokenizer.encode_chat(self.chat_template.render(messages))

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **overrides: Any
    ) -> Result:
        """Generates the next message of a conversation; arguments as in `submit`."""
        return self.generate(self.chat_prompt(messages), params, **overrides)

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
        kv = self._raw_options.kv
        is_tiered = kv == "tiered"
        if context is not None and not is_tiered:
            raise InvalidRequestError("context", 'an engine with kv="tiered"', f"kv={kv!r}")
        options = (context or ContextOptions()) if is_tiered else None
        return Conversation(self._host, options, packs)

    @cached_property
    def _host(self) -> Host:
        info, details = self.info, self._raw_options.kv_detail_layers
        return Host(
            self._core,
            self._submit_turn,
            _core.ConversationImage,
            self.chat_template,
            self.tokenizer,
            self.base,
            TierCosts.from_metadata(str(self._path), self._metadata, len(details)),
            Layout(
                kv=self._raw_options.kv,
                n_layer=info["n_layer"],
                n_head_kv=info["n_head_kv"],
                head_dim=info["head_dim"],
                first_site=info["first_site"],
                detail_layers=details,
            ),
            min(info["n_ctx"], info["n_kv_tokens"]),
        )

    def _spec(self, ids: list[int], params: SamplingParams) -> _core.RequestSpec:
        spec = _core.RequestSpec()
        spec.prompt = ids
        fill_spec(spec, params, self.tokenizer.eog_ids)
        return spec
