"""A teacher behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from modularbase.errors import CancelledError, InvalidRequestError, TeacherError

RETRY_WAIT_S = 1.0

_MAX_WAIT_S = 60.0
_MAX_BODY_BYTES = 16 << 20
_MAX_SHOWN = 200
_BUSY = frozenset((408, 409, 425, 429))  # and all from 500 on
_CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """Where a teacher is asked, and how.

    Attributes:
        url: Up to the version, such as http://127.0.0.1:8000/v1.
        model: The model's name there.
        kind: "chat" asks POST /chat/completions, "text" POST /completions.
        api_key_env: Environment variable with the key; "": none is sent.
        system: What is said to the teacher first; only in a chat.
        max_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Sent along, for servers that know seeds.
        timeout_s: Longest silence of the server.
        n_attempts: Attempts in all, where it is busy or the connection is cut.
    """

    url: str
    model: str
    kind: Literal["chat", "text"] = "chat"
    api_key_env: str = ""
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 120.0
    n_attempts: int = 6

    def __post_init__(self) -> None:
        """Refuses what makes no sense."""
        if not self.url.startswith(("http://", "https://")):
            raise InvalidRequestError("teacher", "an http or https address", self.url)
        if not self.model:
            raise InvalidRequestError("model", "the name of a model of the teacher", "none")
        if self.kind == "text" and self.system:
            raise InvalidRequestError("system", "nothing, or a chat", self.system)
        for name in ("max_tokens", "n_attempts"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(name, "1 or more", str(getattr(self, name)))
        if not 0 <= self.temperature < float("inf"):
            raise InvalidRequestError("temperature", "0 or more", str(self.temperature))
        if not 0 < self.timeout_s < float("inf"):
            raise InvalidRequestError("timeout_s", "more than 0", str(self.timeout_s))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher said, and why it ended: "stop", "length" or what else the server says."""

    text: str
    finish_reason: str


class ChatEndpoint:
    """Asks a teacher. Safe to use from several threads."""

    def __init__(self, options: EndpointOptions) -> None:
        """Reads the key.

        Raises:
            InvalidRequestError: The environment has no such key.
        """
        self._options = options
        path = "chat/completions" if options.kind == "chat" else "completions"
        self.url = f"{options.url.rstrip('/')}/{path}"
        self._headers = {"User-Agent": "modularbase", "Content-Type": "application/json"}
        if options.api_key_env:
            key = os.environ.get(options.api_key_env, "").strip()
            if not key:
                expected = "an environment variable with the key"
                raise InvalidRequestError("api_key_env", expected, options.api_key_env)
            self._headers["Authorization"] = f"Bearer {key}"
        # A redirect would take the key to another server.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, prompt: str, stop: threading.Event) -> Answer:
        """One answer; waits and asks again where the server is busy or the connection is cut.

        Args:
            prompt: The question.
            stop: Once set, no further attempt is made.

        Raises:
            TeacherError: It refuses, answers something else, or several attempts brought nothing.
            CancelledError: `stop` was set.
        """
        body = json.dumps(self._question(prompt)).encode()
        trouble, wait_s = "", 0.0
        for attempt in range(self._options.n_attempts):
            if stop.wait(wait_s):
                break
            try:
                return self._answer(self._post(body))
            except _LaterError as error:
                trouble = str(error)
                backoff_s = RETRY_WAIT_S * 2**attempt * random.uniform(0.5, 1)
                wait_s = min(max(backoff_s, error.wait_s), _MAX_WAIT_S)
        if stop.is_set():
            raise CancelledError
        reason = f"gave up after {self._options.n_attempts} attempts: {trouble}"
        raise TeacherError(self.url, reason)

    def _question(self, prompt: str) -> dict[str, Any]:
        options = self._options
        common = {
            "model": options.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
        }
        if options.kind == "text":
            return {**common, "prompt": prompt}
        messages = [{"role": "system", "content": options.system}] if options.system else []
        return {**common, "messages": [*messages, {"role": "user", "content": prompt}]}

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._options.timeout_s) as response:
                content: bytes = response.read(_MAX_BODY_BYTES + 1)
        except urllib.error.HTTPError as error:
            self._refused(error)
        except _CUT as error:
            raise _LaterError(str(error) or type(error).__name__) from error
        except ValueError as error:  # an address or a key that cannot be sent
            raise TeacherError(self.url, str(error)) from error
        if len(content) > _MAX_BODY_BYTES:
            raise TeacherError(self.url, f"it answered more than {_MAX_BODY_BYTES} bytes")
        return content

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            try:
                said = error.read(_MAX_SHOWN).decode("utf-8", "replace").strip()
            except _CUT:
                said = ""
        reason = f"it answered {error.code}{': ' if said else ''}{said}"
        if error.code in _BUSY or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            raise _LaterError(reason, float(after) if after.isdecimal() else 0.0) from error
        raise TeacherError(self.url, reason, error.code) from error

    def _answer(self, content: bytes) -> Answer:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:  # cut by a proxy, or its page of errors
            raise _LaterError(f"it answered no JSON: {error}") from error
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"] if self._options.kind == "chat" else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            shown = json.dumps(found, ensure_ascii=False)[:_MAX_SHOWN]
            raise TeacherError(self.url, f"expected choices with a text, found {shown}") from error
        if not isinstance(text, str):  # null where it called a tool or refused
            raise TeacherError(self.url, f"expected a text, found {text!r}"[:_MAX_SHOWN])
        return Answer(text, str(choice.get("finish_reason") or "stop"))


class _LaterError(Exception):
    """An attempt that may go better later; `wait_s` is what the server asked to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Leaves the answer as it is: an error of its status."""
