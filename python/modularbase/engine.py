"""The engine as Python sees it. The only module that imports the C++ extension."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from modularbase import _core
from modularbase.bases import install
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.text_stream import StopMatcher
from modularbase.bases.tokenizer import Tokenizer
from modularbase.errors import BaseLoadError, CancelledError, InvalidRequestError
from modularbase.generation import Generation
from modularbase.types import (
    EngineOptions,
    FloatArray,
    Message,
    Prompt,
    Result,
    SamplingParams,
    Score,
)

_WAIT_MS = 100


def read_metadata(path: str | os.PathLike[str]) -> dict[str, object]:
    """All metadata of a GGUF file.

    Raises:
        BaseLoadError: The file is not a usable GGUF file.
    """
    return _core.read_gguf_metadata(_utf8_path(path))


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

    @classmethod
    def load(
        cls,
        base: str | os.PathLike[str],
        *,
        dtype: Literal["auto", "keep", "f16", "bf16", "f32"] = "auto",
        n_threads: int | None = None,
        n_ctx: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        packs: Literal["none"] = "none",
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
            packs: Only "none" so far: the plain base.
            options: What is rarely changed.

        Raises:
            BaseNotFoundError: No such name or file.
            BaseLoadError: The file cannot be used.
            InvalidRequestError: An argument makes no sense.
            DeviceError: The device is not there or has too little memory.
        """
        if packs != "none":
            raise InvalidRequestError("packs", "'none'", repr(packs))
        path = install.resolve(os.fsdecode(base), install=True)
        raw = _core.EngineOptions()
        for field in fields(EngineOptions):
            _assign(raw, field.name, getattr(options or EngineOptions(), field.name))
        _assign(raw, "dtype", dtype)
        _assign(raw, "device", device)
        raw.n_threads = 0 if n_threads is None else _positive("n_threads", n_threads)
        raw.n_ctx = 0 if n_ctx is None else _positive("n_ctx", n_ctx)
        return cls(path, _core.Engine(_utf8_path(path), raw), read_metadata(path))

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
        self._core.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""
        return Tokenizer.from_metadata(self._metadata)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The base's chat template."""
        return ChatTemplate.from_metadata(self._metadata)

    @property
    def info(self) -> dict[str, Any]:
        """What was loaded: path, family, sizes, bytes, threads."""
        return _attributes(self._core.info())

    @property
    def stats(self) -> dict[str, Any]:
        """What the engine is doing, as of its last step."""
        return _attributes(self._core.stats())

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any
    ) -> Generation:
        """Queues a generation and returns at once.

        Args:
            prompt: Text (special tokens in it count) or token ids.
            params: How tokens are chosen.
            **overrides: Fields of `SamplingParams`, over those of params.

        Raises:
            InvalidRequestError: The prompt is empty, or a parameter makes no sense.
            ContextLengthError: Prompt and max_tokens exceed the context.
            KvCacheFullError: The request could never fit the KV cache.
        """
        chosen = _chosen_params(params, overrides)
        # All that may be refused comes before the request runs.
        matcher = StopMatcher(_stop_strings(chosen.stop))
        tokenizer = self.tokenizer
        spec = self._spec(self._token_ids(prompt), chosen)
        return Generation(self._core.submit(spec), tokenizer, matcher, chosen)

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

    def score(self, prompt: Prompt) -> Score:
        """Log-probability of every token given those before it, and their perplexity.

        Raises:
            InvalidRequestError: Fewer than two tokens.
            ContextLengthError: More tokens than the context holds.
        """
        spec = _core.RequestSpec()
        spec.kind = _core.RequestKind.score
        spec.prompt = ids = self._token_ids(prompt)
        logprobs = self._finished(spec).logprobs
        return Score(ids, logprobs, float(np.exp(-logprobs.mean(dtype=np.float64))))

    def hidden(self, prompt: Prompt, layer: int) -> FloatArray:
        """The residual stream entering a layer, [n_tokens, n_embd].

        Args:
            prompt: Text or token ids.
            layer: 0 is the embedding; n_layer leaves the last layer; n_layer + 1 is after the
                output norm.
        """
        return self._hidden(prompt, layer, _core.Pooling.none).reshape(-1, self.info["n_embd"])

    def embed(self, prompt: Prompt, *, pooling: Literal["mean", "last"] = "mean") -> FloatArray:
        """One vector of length 1 for a text, [n_embd]: its pooled last hidden states."""
        if pooling not in ("mean", "last"):
            raise InvalidRequestError("pooling", "'mean' or 'last'", repr(pooling))
        layer = self.info["n_layer"] + 1
        vector = self._hidden(prompt, layer, getattr(_core.Pooling, pooling))
        length = np.float32(max(float(np.linalg.norm(vector)), 1e-12))
        unit: FloatArray = vector / length
        return unit

    def _hidden(self, prompt: Prompt, layer: int, pooling: _core.Pooling) -> FloatArray:
        spec = _core.RequestSpec()
        spec.kind = _core.RequestKind.hidden
        spec.prompt = self._token_ids(prompt)
        _assign(spec, "layer", layer)
        spec.pooling = pooling
        return self._finished(spec).hidden

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
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
            raise InvalidRequestError("prompt", "text or token ids", repr(prompt))
        ids = list(prompt)
        for token in ids:
            if not isinstance(token, (int, np.integer)) or not -(2**31) <= token < 2**31:
                raise InvalidRequestError("prompt", "text or token ids", repr(token))
        return [int(token) for token in ids]

    def _spec(self, ids: list[int], params: SamplingParams) -> _core.RequestSpec:
        spec = _core.RequestSpec()
        spec.prompt = ids
        sampling = spec.sampling
        for name in _SAMPLING_FIELDS:
            _assign(sampling, name, getattr(params, name))
        if params.max_tokens is not None:
            _assign(spec, "max_tokens", _positive("max_tokens", params.max_tokens))
        spec.stop_ids = [] if params.ignore_eos else sorted(self.tokenizer.eog_ids)
        if params.logprobs is not None:
            _assign(spec, "n_logprobs", params.logprobs)
            if params.logprobs < 0:  # -1 means none in the core
                raise InvalidRequestError("logprobs", "at least 0", repr(params.logprobs))
        _assign(spec, "n_draft", params.n_draft)
        if params.timeout_s is not None:
            timeout_s = params.timeout_s
            if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
                raise InvalidRequestError("timeout_s", "a positive number", repr(timeout_s))
            spec.set_timeout(timeout_s)
        return spec


_SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
)


def _assign(target: object, name: str, value: object) -> None:
    try:
        setattr(target, name, dict(value) if name == "logit_bias" else value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(name, "a value of the documented type", repr(value)) from error


def _chosen_params(params: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    try:
        return replace(params or SamplingParams(), **overrides)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(SamplingParams))
        raise InvalidRequestError("sampling parameter", f"one of {known}", str(error)) from error


def _stop_strings(stop: object) -> list[str]:
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, Iterable):
        raise InvalidRequestError("stop", "a string or several", repr(stop))
    return list(stop)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise InvalidRequestError(name, "a positive whole number", repr(value))
    return value


def _utf8_path(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BaseLoadError(ascii(text), "path", "UTF-8", "other bytes") from error
    return text


def _attributes(raw: object) -> dict[str, Any]:
    return {name: getattr(raw, name) for name in dir(raw) if not name.startswith("_")}
