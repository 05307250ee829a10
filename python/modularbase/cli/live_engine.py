"""The engine's side of `modularbase demo live`: what it is asked, and what it does meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from modularbase.engine import Engine
from modularbase.errors import ModularBaseError
from modularbase.generation import Generation
from modularbase.training.lesson import Fact
from modularbase.types import Packs

_ANSWER_TOKENS = 24
_BESIDE_PROMPT = "Once upon a time, there was a little ship that"


@dataclass(frozen=True, slots=True)
class Answers:
    """What the engine says with one generation of the pack.

    Attributes:
        answer: To the question that is shown.
        is_right: Whether it is the table's.
        first_token_at_s: When its first token came, by the system's monotonic clock.
        n_right: Questions of the quiz that were answered as the table says.
        perplexity: Of the quiz's answers, behind the questions as they are taught.
        reworded_perplexity: Behind questions in words that are never trained on.
    """

    answer: str
    is_right: bool
    first_token_at_s: float
    n_right: int
    perplexity: float
    reworded_perplexity: float


def ask(
    engine: Engine, shown: Fact, quiz: Sequence[Fact], packs: Packs, show: Callable[[str], None]
) -> Answers:
    """Asks the question that is shown, then the quiz in one batch, and scores its lines.

    Args:
        engine: Whom to ask.
        shown: The question that is shown.
        quiz: All questions that are counted.
        packs: Which packs answer.
        show: Gets the answer so far, whenever there is more of it.
    """
    generation = _submit(engine, shown, packs)
    answer, first_token_at_s = "", 0.0
    for piece in generation:
        first_token_at_s = first_token_at_s or time.monotonic()
        answer += piece.text
        show(answer)
    running = [(fact, _submit(engine, fact, packs)) for fact in quiz]
    n_right = sum(fact.is_answered_by(asked.result().text) for fact, asked in running)
    return Answers(
        answer=answer.strip(),
        is_right=shown.is_answered_by(answer),
        first_token_at_s=first_token_at_s,
        n_right=n_right,
        perplexity=_perplexity(engine, [(f.question, f.ending) for f in quiz], packs),
        reworded_perplexity=_perplexity(engine, [(f.reworded, f.ending) for f in quiz], packs),
    )


def _perplexity(engine: Engine, lines: Sequence[tuple[str, str]], packs: Packs) -> float:
    """Of the endings of lines, given their beginnings."""
    logprobs = []
    for beginning, ending in lines:
        n_given = len(engine.tokenizer.encode(beginning))
        score = engine.score(beginning + ending, packs=packs)
        logprobs.append(score.logprobs[n_given - 1 :])
    return float(np.exp(-np.concatenate(logprobs).mean(dtype=np.float64)))


def _submit(engine: Engine, fact: Fact, packs: Packs) -> Generation:
    return engine.submit(
        fact.question, packs=packs, max_tokens=_ANSWER_TOKENS, temperature=0, stop="\n"
    )


class OtherUser:
    """Somebody who uses the engine all the time, with the plain base: does serving ever stall?

    Attributes:
        n_requests: Requests begun, each as long as the context.
        n_tokens: Tokens that came.
        longest_gap_ms: Longest time between two of them, also where a request follows another.
    """

    def __init__(self, engine: Engine) -> None:
        """Begins; use it as a context manager."""
        self.n_requests = self.n_tokens = 0
        self.longest_gap_ms = 0.0
        self._last_token_s = 0.0
        self._engine = engine
        self._over = threading.Event()
        self._error: ModularBaseError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what ended its requests.

        Raises:
            ModularBaseError: As the engine said it.
        """
        if self._error:
            raise self._error

    def close(self) -> None:
        """Ends its request; closing twice is fine."""
        self._over.set()
        self._thread.join()

    def __enter__(self) -> OtherUser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._read(self._engine.submit(_BESIDE_PROMPT, seed=0, ignore_eos=True))
        except ModularBaseError as error:
            self._error = error

    def _read(self, generation: Generation) -> None:
        self.n_requests += 1
        for piece in generation:
            if self._over.is_set():
                generation.cancel()
                return
            now_s = time.monotonic()
            if self.n_tokens > 0:
                gap_ms = 1e3 * (now_s - self._last_token_s)
                self.longest_gap_ms = max(self.longest_gap_ms, gap_ms)
            self._last_token_s = now_s
            self.n_tokens += len(piece.token_ids)
