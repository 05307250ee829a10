"""What `modularbase demo live` says of each generation: a line, or JSON."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRow:
    """One generation of the pack.

    Attributes:
        elapsed_s: Since the beginning.
        generation: Its number; 0 is the base without the pack.
        step: Of the trainer's.
        n_steps: That it does in all.
        loss: Of that step, in nats a token.
        question: The question that is shown.
        expected: What the table says.
        answer: What the engine said.
        is_right: Whether they are the same.
        n_right: Questions of the quiz that were answered as the table says.
        n_questions: Questions of the quiz.
        perplexity: Of the quiz's answers, behind the questions as they are taught.
        reworded_perplexity: Behind questions in words that are never trained on.
        first_token_ms: From the publish to the first token of the answer; None where it was not
            asked at once, since the generation before it was still being asked.
        other_requests: Of the other user's, so far.
        other_tokens: That the other user got, so far.
        longest_gap_ms: Longest time between two of them, so far.
    """

    elapsed_s: float
    generation: int
    step: int
    n_steps: int
    loss: float | None
    question: str
    expected: str
    answer: str
    is_right: bool
    n_right: int
    n_questions: int
    perplexity: float
    reworded_perplexity: float
    first_token_ms: float | None
    other_requests: int
    other_tokens: int
    longest_gap_ms: float


class View(Protocol):
    """Where the answers are shown."""

    def shown(self) -> AbstractContextManager[object]:
        """Shows it until the block ends."""

    def answering(self, text: str) -> None:
        """An answer as far as it has come."""

    def answered(self, row: LiveRow) -> None:
        """A generation has answered everything."""


class LineView:
    """A line for every generation, where there is no terminal."""

    def shown(self) -> AbstractContextManager[object]:
        """Needs no preparation."""
        return nullcontext()

    def answering(self, text: str) -> None:
        """Waits for the whole answer."""

    def answered(self, row: LiveRow) -> None:
        """Prints it."""
        mark = "right" if row.is_right else "wrong"
        sys.stdout.write(
            f"{row.elapsed_s:5.0f} s  generation {row.generation:2}  "
            f"{row.n_right:2} of {row.n_questions} right  perplexity {row.perplexity:6.1f}  "
            f"{row.question} {row.answer} ({mark})\n"
        )
        sys.stdout.flush()


class JsonView(LineView):
    """The same for scripts: a JSON document a line."""

    def answered(self, row: LiveRow) -> None:
        """Prints it."""
        sys.stdout.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        sys.stdout.flush()
