"""Checks what callers pass, and writes it into the runtime's request objects."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from modularbase.errors import BaseLoadError, InvalidRequestError
from modularbase.types import SamplingParams

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


def token_ids(prompt: object) -> list[int]:
    """Checks token ids.

    Raises:
        InvalidRequestError: They are none.
    """
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
        raise InvalidRequestError("prompt", "text or token ids", repr(prompt))
    ids = list(prompt)
    for token in ids:
        if not isinstance(token, (int, np.integer)) or not -(2**31) <= token < 2**31:
            raise InvalidRequestError("prompt", "text or token ids", repr(token))
    return [int(token) for token in ids]


def fill_spec(spec: Any, params: SamplingParams, eog_ids: Iterable[int]) -> None:
    """Writes sampling parameters into a request of the runtime.

    Raises:
        InvalidRequestError: A parameter makes no sense.
    """
    sampling = spec.sampling
    for name in _SAMPLING_FIELDS:
        assign(sampling, name, getattr(params, name))
    if params.max_tokens is not None:
        assign(spec, "max_tokens", positive("max_tokens", params.max_tokens))
    spec.stop_ids = [] if params.ignore_eos else sorted(eog_ids)
    if params.logprobs is not None:
        assign(spec, "n_logprobs", params.logprobs)
        if params.logprobs < 0:  # -1 means none in the core
            raise InvalidRequestError("logprobs", "at least 0", repr(params.logprobs))
    assign(spec, "n_draft", params.n_draft)
    if params.timeout_s is not None:
        timeout_s = params.timeout_s
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
            raise InvalidRequestError("timeout_s", "a positive number", repr(timeout_s))
        spec.set_timeout(timeout_s)


def assign(target: object, name: str, value: object) -> None:
    """Sets an attribute of an object of the runtime, which takes only the documented type."""
    try:
        setattr(target, name, dict(value) if name == "logit_bias" else value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(name, "a value of the documented type", repr(value)) from error


def member_named(kind: Any, field: str, name: str) -> Any:
    """The member of an enumeration of the runtime."""
    members = kind.__members__
    if name not in members:
        raise InvalidRequestError(field, " or ".join(map(repr, members)), repr(name))
    return members[name]


def chosen_params(params: SamplingParams | None, overrides: dict[str, Any]) -> SamplingParams:
    """The parameters with some fields replaced."""
    try:
        return replace(params or SamplingParams(), **overrides)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(SamplingParams))
        raise InvalidRequestError("sampling parameter", f"one of {known}", str(error)) from error


def stop_strings(stop: object) -> list[str]:
    """The stop strings of a request."""
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, Iterable):
        raise InvalidRequestError("stop", "a string or several", repr(stop))
    return list(stop)


def positive(name: str, value: int) -> int:
    """A whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise InvalidRequestError(name, "a positive whole number", repr(value))
    return value


def utf8_path(path: str | os.PathLike[str]) -> str:
    """A path as the runtime takes it."""
    text = os.fspath(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BaseLoadError(ascii(text), "path", "UTF-8", "other bytes") from error
    return text


def attributes(raw: object) -> dict[str, Any]:
    """The public attributes of an object of the runtime."""
    return {name: getattr(raw, name) for name in dir(raw) if not name.startswith("_")}
