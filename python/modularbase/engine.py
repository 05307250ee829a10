"""The engine as Python sees it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from modularbase import _core
from modularbase.attachment import Attachment, Published
from modularbase.bases import install
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.identity import BaseIdentity
from modularbase.bases.text_stream import StopMatcher
from modularbase.bases.tokenizer import Tokenizer
from modularbase.byte_sizes import parse_bytes
from modularbase.context.costs import TierCosts
from modularbase.conversation import Conversation, Host
from modularbase.conversation_file import Layout
from modularbase.engine_packs import EnginePacks
from modularbase.errors import CancelledError, InvalidRequestError
from modularbase.generation import Generation
from modularbase.pack_requests import PackPreparer, Predictor, PreparedPacks, parse_packs
from modularbase.packs.channel_info import ChannelInfo
from modularbase.packs.spec import bare_name
from modularbase.request_specs import (
    assign,
    attributes,
    chosen_params,
    fill_spec,
    member_named,
    positive,
    stop_strings,
    token_ids,
    utf8_path,
)
from modularbase.tap import RowType, Tap, row_type_number
from modularbase.types import (
    ContextOptions,
    EngineOptions,
    FloatArray,
    KvKind,
    Message,
    OnPublish,
    Packs,
    Prompt,
    Result,
    SamplingParams,
    Score,
)

_WAIT_MS = 100
_PROBE_ROWS = 2  # a step, while others generate: they lose little by it


def read_metadata(path: str | os.PathLike[str]) -> dict[str, object]:
    """All metadata of a GGUF file.

    Raises:
        BaseLoadError: The file is not a usable GGUF file.
    """
    return _core.read_gguf_metadata(utf8_path(path))


def read_matrix(path: str | os.PathLike[str], name: str) -> FloatArray:
    """A matrix of a GGUF file in F32, [n_rows, n_per_row].

    Raises:
        BaseLoadError: The file is not usable, or has no such matrix.
    """
    return _core.read_gguf_rows(utf8_path(path), name)


def build_info() -> dict[str, object]:
    """What the C++ runtime was built with and uses here."""
    return {"ggml": _core.ggml_version, "cpu_features": _core.cpu_features()}


class Engine:
    """A resident base that serves requests from any thread.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: Path, core: _core.Engine, metadata: dict[str, object]) -> None:
        """Use `Engine.load`."""
        self._path = path
        self._core = core
        self._metadata = metadata
        self._raw_options = _core.EngineOptions()
        self._default_packs: tuple[str, ...] = ()
        self._predictor: Predictor | None = None
        self._attachments: list[Attachment] = []

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
        engine = cls(path, _core.Engine(utf8_path(path), raw), metadata)
        engine._raw_options = raw
        engine._default_packs = tuple(default_packs)
        engine._predictor = predictor
        return engine

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

    def close(self) -> None:
        """Cancels what runs and frees the base; closing twice is fine."""
        while self._attachments:
            self._attachments.pop().detach()
        self._core.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return Tokenizer.from_metadata(self._metadata)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The base's chat template."""
        return ChatTemplate.from_metadata(self._metadata)

    @cached_property
    def base(self) -> BaseIdentity:
        """Name, version and digest of the base."""
        return BaseIdentity(self._path, self._metadata)

    @cached_property
    def packs(self) -> EnginePacks:
        """The packs of this engine: list, load, evict, pin, swap.

        Raises:
            InvalidRequestError: The engine was loaded with pack_budget 0.
        """
        return EnginePacks(self._core.packs(), self.base, read_metadata, self._probe)

    def attach(
        self, name: str, *, channel: str, on_publish: OnPublish = "new_requests"
    ) -> Attachment:
        """Lets a name follow what a trainer publishes (`modularbase.training.publish`).

        Each generation is read, checked and loaded beside the requests that run, and the name then
        points to it; one that cannot be used is kept in the attachment's `last_error`.

        Args:
            name: A pack's id, known or new.
            channel: The channel's name; its writer must have made it.
            on_publish: Who gets a new generation. "new_requests": those that come after it, and
                requests that run keep what they began with. "live": those that run, too, from their
                next step on (see `Result.pack_switches`).

        Raises:
            ChannelError: There is no such channel, or it holds no pack.
            PackIncompatibleError: The pack is made for another base.
            InvalidRequestError: No request could use the name, or there is no such policy.
        """
        core_packs, reader = self._core.packs(), _core.WeightReader(channel)

        def open_reader(info: ChannelInfo) -> Callable[[], Published]:
            packs = _core.PackReader(reader, core_packs, name, info.shape, info.scale)
            return lambda: packs.read_into(core_packs)

        attachment = Attachment(
            name, reader, self.packs, open_reader, self._core.switch_packs, on_publish
        )
        self._attachments = [known for known in self._attachments if known.is_live]
        self._attachments.append(attachment)
        return attachment

    @cached_property
    def _preparer(self) -> PackPreparer:
        return PackPreparer(self.packs, self._default_packs, self._predictor)

    @property
    def info(self) -> dict[str, Any]:
        """What was loaded: path, family, sizes, bytes, threads."""
        return attributes(self._core.info())

    @property
    def stats(self) -> dict[str, Any]:
        """What the engine is doing, as of its last step."""
        return attributes(self._core.stats())

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

    def _submit_turn(
        self,
        ids: Sequence[int],
        tiers: bytes,
        conversation: int,
        params: SamplingParams,
        packs: Packs,
    ) -> Generation:
        spec = self._spec(list(ids), params)
        spec.conversation = conversation
        spec.set_tiers(tiers)
        return self._submitted(spec, params, packs)

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
                attention=self._raw_options.attention,
                n_layer=info["n_layer"],
                n_head_kv=info["n_head_kv"],
                head_dim=info["head_dim"],
                first_site=info["first_site"],
                detail_layers=details,
            ),
        )

    def score(self, prompt: Prompt, *, packs: Packs = None) -> Score:
        """Log-probability of every token given those before it, and their perplexity.

        Raises:
            InvalidRequestError: Fewer than two tokens.
            ContextLengthError: More tokens than the context holds.
        """
        spec = _core.RequestSpec()
        spec.kind = _core.RequestKind.score
        spec.prompt = ids = self._token_ids(prompt)
        with self._add_packs(spec, packs, None):
            logprobs = self._finished(spec).logprobs
        return Score(ids, logprobs, float(np.exp(-logprobs.mean(dtype=np.float64))))

    def hidden(
        self,
        prompt: Prompt,
        layer: int,
        *,
        pooling: Literal["none", "mean", "last"] = "none",
        packs: Packs = None,
    ) -> FloatArray:
        """The residual stream entering a layer, [n_tokens, n_embd]; pooled, [1, n_embd].

        Args:
            prompt: Text or token ids.
            layer: 0 is the embedding; n_layer leaves the last layer; n_layer + 1 is after the
                output norm.
            pooling: "mean" of all tokens, or the "last" one's.
            packs: As in `submit`.
        """
        spec = self._hidden_spec(prompt, layer, member_named(_core.Pooling, "pooling", pooling))
        with self._add_packs(spec, packs, None):
            return self._finished(spec).hidden.reshape(-1, self.info["n_embd"])

    def embed(self, prompt: Prompt, *, pooling: Literal["mean", "last"] = "mean") -> FloatArray:
        """One vector of length 1 for a text, [n_embd]: its pooled last hidden states."""
        if pooling not in ("mean", "last"):
            raise InvalidRequestError("pooling", "'mean' or 'last'", repr(pooling))
        layer = self.info["n_layer"] + 1
        spec = self._hidden_spec(prompt, layer, getattr(_core.Pooling, pooling))
        vector = self._finished(spec).hidden
        length = np.float32(max(float(np.linalg.norm(vector)), 1e-12))
        unit: FloatArray = vector / length
        return unit

    def tap(
        self,
        channel: str,
        *,
        layer: int | None = None,
        n_records: int = 4096,
        row_type: RowType = "f16",
    ) -> Tap:
        """Puts every row that enters a layer from now on into a ring in shared memory.

        Rows of all requests, with token id, request and position, as docs/weight-channel.md says.
        What the prefix cache knows is not computed again, so it does not come; `hidden` and `score`
        compute every position.

        Args:
            channel: Name of the ring, 1 to 64 of A-Z a-z 0-9 . _ -
            layer: 0 is the embedding; None takes the first site's layer.
            n_records: Rows that wait for the consumer at most; more are dropped, and counted.
            row_type: "f16" holds numbers up to 65504.

        Raises:
            InvalidRequestError: An argument makes no sense, or the engine has an open tap.
            ChannelError: No room, or another has a ring of this name.
            CancelledError: The engine is closed.
        """
        if layer is None:
            layer = -1
        elif isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            last = self.info["n_layer"] - 1
            raise InvalidRequestError("layer", f"0..{last}, or None", repr(layer))
        number = row_type_number(row_type)
        return Tap(
            channel, self._core.tap(channel, layer, positive("n_records", n_records), number)
        )

    def _hidden_spec(self, prompt: Prompt, layer: int, pooling: _core.Pooling) -> _core.RequestSpec:
        spec = _core.RequestSpec()
        spec.kind = _core.RequestKind.hidden
        spec.prompt = self._token_ids(prompt)
        assign(spec, "layer", layer)
        spec.pooling = pooling
        return spec

    def _probe(self, tokens: Sequence[int], generation: int | None) -> FloatArray:
        """Final hidden states with one generation, or without: [n_tokens, n_embd]."""
        spec = self._hidden_spec(tokens, self.info["n_layer"] + 1, _core.Pooling.none)
        spec.n_rows_beside = _PROBE_ROWS
        if generation is not None:
            spec.add_pack_choice([(generation, 1.0, "")])
        return self._finished(spec).hidden.reshape(len(tokens), -1)

    def _add_packs(
        self, spec: _core.RequestSpec, packs: Packs, timeout_s: float | None
    ) -> PreparedPacks:
        request = parse_packs(packs)
        if not request.packs:
            return PreparedPacks(request, ())
        spec.policy = member_named(_core.MergePolicy, "policy", request.policy)
        spec.activation = member_named(_core.Activation, "activation", request.activation)
        if request.fallback not in ("on_failure", "always", "never"):
            raise InvalidRequestError(
                "fallback", "'on_failure', 'always' or 'never'", repr(request.fallback)
            )
        if not isinstance(request.user, str):
            raise InvalidRequestError("user", "a name, or ''", repr(request.user))
        prepared = self._preparer.prepare(request, timeout_s)
        for choice in prepared.choices:
            uses = [(g.core_id, use.weight, bare_name(use.pack)) for use, g in choice.uses]
            try:
                spec.add_pack_choice(uses)
            except TypeError as error:
                raise InvalidRequestError("packs weight", "a number", repr(uses)) from error
        return prepared

    def _finished(self, spec: _core.RequestSpec) -> _core.RequestResult:
        ticket = self._core.submit(spec)
        try:
            while not ticket.wait_finished(_WAIT_MS):
                pass
        except KeyboardInterrupt:
            ticket.cancel()
            raise
        result = ticket.result()
        if result.finish_reason == _core.FinishReason.cancelled:
            raise CancelledError("the engine was closed")
        return result

    def _token_ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)

    def _spec(self, ids: list[int], params: SamplingParams) -> _core.RequestSpec:
        spec = _core.RequestSpec()
        spec.prompt = ids
        fill_spec(spec, params, self.tokenizer.eog_ids)
        return spec
