"""A teacher's answers to prompts, kept as they come, so that nothing is asked twice."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modularbase.errors import InvalidRequestError, TeacherError
from modularbase.storage.disk import disk_errors
from modularbase.storage.files import appearing
from modularbase.training.chat_endpoint import Answer

# Of all prompts: above it, something is wrong with the teacher and not with a prompt.
_MAX_FAILED_SHARE = 0.1
_HOPELESS = frozenset((301, 302, 307, 308, 401, 402, 403, 404, 405))  # the next would fail, too


class Teacher(Protocol):
    """Who answers."""

    @property
    def url(self) -> str:
        """Its address, for messages."""

    def ask(self, prompt: str, stop: threading.Event) -> Answer:
        """One answer; see `ChatEndpoint.ask`."""


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far the teacher is: prompts answered, given up, and all."""

    n_answered: int
    n_failed: int
    n_all: int


OnProgress = Callable[[AnswerProgress], None]


@dataclass(frozen=True, slots=True)
class Taught:
    """What there is to learn from.

    Attributes:
        path: A .jsonl file with `prompt` and `response` of every usable answer.
        n_rows: Their number.
        n_unfinished: Answers left out because they were cut off at their longest.
        n_empty: Answers left out because they say nothing.
        n_failed: Prompts that have no answer.
    """

    path: Path
    n_rows: int
    n_unfinished: int
    n_empty: int
    n_failed: int


def read_prompts(path: Path) -> list[str]:
    """Prompts of a .jsonl file (`prompt` of every row) or of any other file (one a line).

    Raises:
        InvalidRequestError: No such file, no UTF-8, rows without a prompt, or no prompt at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError("prompts", "a file in UTF-8", f"{path}: {error}") from error
    prompts = [
        _prompt(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line.strip()
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InvalidRequestError("prompts", "at least one", f"none in {path}")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError("prompts", "an object with 'prompt'", place) from error
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequestError("prompts", "a 'prompt' with text", place)
    return prompt


def gather_answers(
    teacher: Teacher,
    prompts: Sequence[str],
    folder: Path,
    *,
    n_at_once: int = 4,
    on_progress: OnProgress = lambda _: None,
) -> Taught:
    """Asks for what is not answered yet. Ctrl-C loses nothing: the next call goes on from there.

    Args:
        teacher: Who is asked.
        prompts: The questions; one that comes twice is asked once.
        folder: Where answers.jsonl grows, and train.jsonl is written in the end.
        n_at_once: Questions under way at a time.
        on_progress: Called with every answer.

    Raises:
        InvalidRequestError: answers.jsonl holds something else, or no answer is usable.
        TeacherError: The teacher refuses, or fails at more than a tenth of the prompts.
        InstallError: The folder cannot be written.
    """
    if n_at_once < 1:
        raise InvalidRequestError("n_at_once", "1 or more", str(n_at_once))
    with disk_errors(folder.name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "answers.jsonl"
        answers = _read_answers(path)
        wanted = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answers]
        n_failed = _ask_all(teacher, wanted, path, answers, n_at_once, on_progress)
    return _write_taught(folder / "train.jsonl", prompts, answers, n_failed)


def _ask_all(
    teacher: Teacher,
    prompts: Sequence[str],
    path: Path,
    answers: dict[str, Answer],
    n_at_once: int,
    on_progress: OnProgress,
) -> int:
    """Adds answers to the file and to `answers`; returns how many prompts failed."""
    n_failed, n_known = 0, len(answers)
    n_all = n_known + len(prompts)
    with _Pool(teacher, prompts, n_at_once) as pool, path.open("a", encoding="utf-8") as file:
        on_progress(AnswerProgress(n_known, 0, n_all))
        for _ in prompts:
            prompt, found = pool.next()
            if isinstance(found, Answer):
                row = {"prompt": prompt, "response": found.text}
                row["finish_reason"] = found.finish_reason
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                answers[prompt] = found
            elif not isinstance(found, TeacherError) or found.status in _HOPELESS:
                raise found
            else:
                n_failed += 1
            if n_failed > _MAX_FAILED_SHARE * n_all:
                reason = f"{n_failed} of {n_all} prompts failed, the last with: {found}"
                raise TeacherError(teacher.url, f"{reason}; the same command asks them again")
            on_progress(AnswerProgress(len(answers), n_failed, n_all))
    return n_failed


class _Pool:
    """Threads that ask. They are daemons: Ctrl-C need not wait for a server that is silent."""

    def __init__(self, teacher: Teacher, prompts: Sequence[str], n_threads: int) -> None:
        self._teacher = teacher
        self._stop = threading.Event()
        self._prompts: queue.SimpleQueue[str] = queue.SimpleQueue()
        for prompt in prompts:
            self._prompts.put(prompt)
        self._found: queue.SimpleQueue[tuple[str, Answer | Exception]] = queue.SimpleQueue()
        for _ in range(min(n_threads, len(prompts))):
            threading.Thread(target=self._work, daemon=True).start()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def next(self) -> tuple[str, Answer | Exception]:
        """The next prompt that is done, with its answer or what went wrong."""
        return self._found.get()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                prompt = self._prompts.get_nowait()
            except queue.Empty:
                return
            try:
                self._found.put((prompt, self._teacher.ask(prompt, self._stop)))
            except Exception as error:  # whatever it is, whoever waits must hear of it
                self._found.put((prompt, error))


def _read_answers(path: Path) -> dict[str, Answer]:
    """Answers by prompt; a last line that a crash cut off is taken away."""
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = enumerate(whole.splitlines(), 1)
    return dict(_kept(line, f"{path}, line {number}") for number, line in lines)


def _kept(line: bytes, place: str) -> tuple[str, Answer]:
    try:
        row = json.loads(line)
        values = [row[name] for name in ("prompt", "response", "finish_reason")]
    except (ValueError, TypeError, KeyError):
        values = [None]
    if not all(isinstance(value, str) for value in values):
        expected = "an object with 'prompt', 'response' and 'finish_reason'"
        raise InvalidRequestError("answers", expected, place)
    return values[0], Answer(*values[1:])


def _write_taught(
    path: Path, prompts: Sequence[str], answers: Mapping[str, Answer], n_failed: int
) -> Taught:
    """Writes the usable answers in the order of the prompts."""
    known = {prompt: answers[prompt] for prompt in prompts if prompt in answers}
    finished = {p: answer for p, answer in known.items() if answer.finish_reason != "length"}
    usable = {p: answer for p, answer in finished.items() if answer.text.strip()}
    n_unfinished, n_empty = len(known) - len(finished), len(finished) - len(usable)
    if not usable:
        found = f"{n_unfinished} cut off at max_tokens, {n_empty} empty, {n_failed} failed"
        raise InvalidRequestError("answers", "at least one that is whole", found)
    rows = [{"prompt": p, "response": answer.text} for p, answer in usable.items()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with appearing(path) as part:
        part.write_text(text, encoding="utf-8")
    return Taught(path, len(rows), n_unfinished, n_empty, n_failed)
