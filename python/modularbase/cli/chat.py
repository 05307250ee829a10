"""`modularbase chat`: an interactive conversation."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from modularbase.cli import options as o
from modularbase.cli.console import DEFAULT_BASE, Base, decode_input, err
from modularbase.engine import Engine
from modularbase.errors import ModularBaseError

HELP = """\
/help            this list
/system TEXT     set the system message and start over
/reset           forget the conversation
/undo            take back the last question and its answer
/retry           answer the last question again
/params          show the sampling parameters
/set NAME VALUE  change one (temperature, top_k, top_p, min_p, max_tokens, seed, ...)
/save FILE       write the conversation as JSON
/load FILE       read one back
/stats           tokens and speed of the last answer
/exit            leave (Ctrl-D does too; Ctrl-C stops an answer)"""


@dataclass
class Conversation:
    """The messages so far and how answers are sampled."""

    engine: Engine
    params: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    last_stats: str = "nothing answered yet"

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, question: str) -> None:
        """Streams an answer to stdout and remembers both, an interrupted one as far as it came."""
        self.messages.append({"role": "user", "content": question})
        try:
            generation = self.engine.submit(self.engine.chat_prompt(self.messages), **self.params)
        except ModularBaseError:
            self.messages.pop()
            raise
        text = ""
        try:
            for piece in generation:
                text += piece.text
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            result = generation.result()
            self.last_stats = (
                f"{result.usage.prompt_tokens} prompt tokens "
                f"({result.usage.cached_tokens} cached), "
                f"{result.usage.completion_tokens} generated at {result.timings.decode_tps:.1f}/s, "
                f"first after {result.timings.ttft_ms:.0f} ms"
            )
        except KeyboardInterrupt:
            generation.cancel()
        sys.stdout.write("\n")
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Takes back the last exchange; returns its question."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            return self.messages.pop()["content"]
        return None


def chat(
    base: Base = DEFAULT_BASE,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: o.DType = "auto",
    threads: o.Threads = None,
    n_ctx: o.Context = None,
    device: o.Device = "auto",
    max_tokens: o.MaxTokens = None,
    temperature: o.Temperature = 0.8,
    top_k: o.TopK = 40,
    top_p: o.TopP = 0.95,
    min_p: o.MinP = 0.05,
    repeat_penalty: o.RepeatPenalty = 1.0,
    seed: o.Seed = None,
    pack: o.Pack = None,
    pack_budget: o.PackBudget = None,
    policy: o.Policy = "blend",
    fallback: o.Fallback = "on_failure",
) -> None:
    """Chats with a base; /help lists the commands."""
    params = o.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    params["packs"] = o.pack_request(pack, policy, fallback)
    with o.load(base, dtype, threads, n_ctx, device, pack_budget) as engine:
        conversation = Conversation(engine, params, system)
        conversation.reset()
        if sys.stdin.isatty():
            err.print(f"[bold]{Path(engine.info['path']).stem}[/] — /help lists the commands")
        while True:
            try:
                line = _read_line()
                if line is None or not _handle(conversation, line.strip()):
                    break
            except ModularBaseError as error:
                err.print(f"[red]{type(error).__name__}:[/] {error}")


def _read_line() -> str | None:
    if not sys.stdin.isatty():
        raw = sys.stdin.buffer.readline()
        return decode_input(raw) if raw else None
    try:
        return input("> ")
    except EOFError:
        return None


def _handle(conversation: Conversation, line: str) -> bool:
    """Acts on one line; False ends the chat."""
    if not line.startswith("/"):
        if line:
            conversation.answer(line)
        return True
    command, _, rest = line[1:].partition(" ")
    if command in ("exit", "quit"):
        return False
    action = _COMMANDS.get(command)
    if action is None:
        err.print(f"no command /{command}; /help lists them")
    else:
        action(conversation, rest.strip())
    return True


def _help(_: Conversation, __: str) -> None:
    err.print(HELP, markup=False, highlight=False)


def _reset(conversation: Conversation, _: str) -> None:
    conversation.reset()


def _undo(conversation: Conversation, _: str) -> None:
    conversation.undo()


def _params(conversation: Conversation, _: str) -> None:
    err.print(json.dumps(conversation.params, default=asdict, ensure_ascii=False))


def _stats(conversation: Conversation, _: str) -> None:
    err.print(conversation.last_stats)


def _set(conversation: Conversation, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if name not in conversation.params or name == "stop":
        err.print(f"no parameter {name!r}; /params shows them")
        return
    try:
        conversation.params[name] = None if value in ("", "none") else json.loads(value)
    except ValueError:
        err.print(f"{name}: a number expected, found {value!r}")


def _save(conversation: Conversation, rest: str) -> None:
    try:
        text = json.dumps(conversation.messages, ensure_ascii=False, indent=2)
        Path(rest).write_text(text, encoding="utf-8")
        err.print(f"saved {len(conversation.messages)} messages to {rest}")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        err.print(f"cannot write {rest}: {error}")


def _load(conversation: Conversation, rest: str) -> None:
    try:
        messages = json.loads(Path(rest).read_text(encoding="utf-8"))
        conversation.engine.chat_template.render(messages)
    except (OSError, ValueError, ModularBaseError) as error:
        err.print(f"cannot load {rest}: {error}")
        return
    conversation.messages = messages
    err.print(f"loaded {len(messages)} messages")


def _system(conversation: Conversation, rest: str) -> None:
    conversation.system = rest or None
    conversation.reset()


def _retry(conversation: Conversation, _: str) -> None:
    question = conversation.undo()
    if question is None:
        err.print("nothing to answer again")
    else:
        conversation.answer(question)


_COMMANDS = {
    "help": _help,
    "system": _system,
    "reset": _reset,
    "undo": _undo,
    "retry": _retry,
    "params": _params,
    "set": _set,
    "save": _save,
    "load": _load,
    "stats": _stats,
}
