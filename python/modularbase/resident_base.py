"""A base in memory: what it is, its packs, and what it computes beside text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modularbase import _core
from modularbase.attachment import Attachment, Published
from modularbase.bases.chat_template import ChatTemplate
from modularbase.bases.identity import BaseIdentity
from modularbase.bases.tokenizer import Tokenizer
from modularbase.engine_packs import EnginePacks
from modularbase.errors import CancelledError, InvalidRequestError
from modularbase.gguf_file import read_metadata
from modularbase.pack_requests import PackPreparer, Predictor, PreparedPacks, parse_packs
from modularbase.packs.channel_info import ChannelInfo
from modularbase.packs.spec import bare_name
from modularbase.request_specs import (
    assign,
    attributes,
    member_named,
    positive,
    token_ids,
    utf8_path,
)
from modularbase.tap import RowType, Tap, row_type_number
from modularbase.types import FloatArray, OnPublish, Packs, Prompt, Score

_WAIT_MS = 100
_PROBE_ROWS = 2  # a step, while others generate: they lose little by it


class ResidentBase:
    """A base in memory, for requests from any thread; `modularbase.Engine` makes it answer."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, object],
        options: _core.EngineOptions,
        default_packs: Sequence[str],
        predictor: Predictor | None,
    ) -> None:
        """Use `Engine.load`."""
        self._path = path
        self._metadata = metadata
        self._raw_options = options
        self._core = _core.Engine(utf8_path(path), options)
        self._default_packs = tuple(default_packs)
        self._predictor = predictor
        self._attachments: list[Attachment] = []

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
