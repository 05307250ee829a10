"""Turns chat messages into the prompt a base was trained on, by the template in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import NoReturn

import jinja2

from modularbase.bases.template_meter import METER, Meter
from modularbase.bases.template_sandbox import TemplateSandbox
from modularbase.errors import ChatTemplateError, InvalidRequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_KEY = "tokenizer.chat_template"
_MAX_SOURCE = 1_000_000
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A compiled chat template. Immutable and thread-safe."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Compiles a template.

        Args:
            source: jinja2 source.
            bos_token: Name of the BOS token, which templates may write out.
            eos_token: Name of the EOS token.

        Raises:
            ChatTemplateError: It does not compile.
        """
        if len(source) > _MAX_SOURCE:
            raise ChatTemplateError(f"longer than {_MAX_SOURCE} characters")
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = TemplateSandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(error.message or "syntax error", error.lineno) from error
        except Exception as error:  # nested too deeply for jinja2's or Python's compiler
            raise ChatTemplateError(f"cannot be compiled: {_words(error)}") from error

    @classmethod
    def from_metadata(cls, meta: Mapping[str, object]) -> ChatTemplate:
        """Takes the template of a GGUF file; ChatML where there is none but its tokens are there.

        Raises:
            ChatTemplateError: There is no template, or it does not compile.
        """
        tokens = meta.get("tokenizer.ggml.tokens")
        names: Sequence[object] = tokens if isinstance(tokens, (list, tuple)) else ()
        source = meta.get(_KEY)
        if source is None and "<|im_start|>" in names and "<|im_end|>" in names:
            source = _CHATML
        if source is None:
            raise ChatTemplateError("the base has none; it was not made for chat")
        if not isinstance(source, str):
            raise ChatTemplateError("not valid UTF-8 text")
        return cls(
            source,
            bos_token=_token_name(meta, "bos_token_id", names),
            eos_token=_token_name(meta, "eos_token_id", names),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Renders a conversation up to where the assistant's next message begins.

        Args:
            messages: Each with "role" (one of ROLES) and "content" (text).
            tools: Descriptions of callable tools, where the template knows tools.
            variables: More variables of the template, such as enable_thinking.

        Raises:
            InvalidRequestError: The messages are malformed.
            ChatTemplateError: The template refuses them, fails, or exceeds its limits.
        """
        return self._render(messages, tools, variables, {"add_generation_prompt": True})

    def render_history(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Renders a finished conversation; arguments and errors as in `render`."""
        return self._render(messages, tools, variables, {"add_generation_prompt": False})

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        variables: Mapping[str, object] | None,
        ending: Mapping[str, object],
    ) -> str:
        given: dict[str, object] = {**self._tokens, **ending, **(variables or {})}
        given["messages"] = _checked_messages(messages)
        given["tools"] = None if tools is None else [dict(tool) for tool in tools]
        given["raise_exception"] = _raise_exception
        given["strftime_now"] = _strftime_now
        meter = Meter()
        token = METER.set(meter)
        try:
            return "".join(map(str, meter.kept(self._template.generate(given))))
        except ChatTemplateError as error:
            raise ChatTemplateError(error.reason, _line(error.__traceback__)) from None
        except Exception as error:  # whatever the template's expressions raise
            raise ChatTemplateError(_words(error), _line(error.__traceback__)) from error
        finally:
            METER.reset(token)


def _checked_messages(messages: object) -> list[dict[str, object]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "none" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise InvalidRequestError("messages", "a list of messages", found)
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _checked_message(name: str, message: object) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(name, "a mapping with role and content", type(message).__name__)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"{name}.role", f"one of {', '.join(ROLES)}", repr(role))
    content = message.get("content")
    calls_tools = content is None and message.get("tool_calls")
    if not isinstance(content, str) and not calls_tools:
        raise InvalidRequestError(f"{name}.content", "a string", type(content).__name__)
    return dict(message)


def _token_name(meta: Mapping[str, object], key: str, names: Sequence[object]) -> str:
    token_id = meta.get(f"tokenizer.ggml.{key}")
    if not isinstance(token_id, int) or not 0 <= token_id < len(names):
        return ""
    name = names[token_id]
    return name if isinstance(name, str) else ""


def _raise_exception(message: object) -> NoReturn:
    raise ChatTemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().astimezone().strftime(layout)


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "calls itself too deeply"
    if isinstance(error, MemoryError):
        return "needs too much memory"
    return str(error) or type(error).__name__


def _line(traceback: TracebackType | None) -> int | None:
    """The last line of the template an error passed through."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
