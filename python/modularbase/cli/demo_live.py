"""`modularbase demo live`: a pack is trained in one process while it is served in another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from modularbase.attachment import Attachment
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err, out
from modularbase.cli.live_engine import OtherUser, ask
from modularbase.cli.live_screen import ScreenView
from modularbase.cli.live_view import JsonView, LineView, LiveRow, View
from modularbase.cli.train_run import need_extra
from modularbase.engine import Engine
from modularbase.errors import ChannelError, InvalidRequestError, TrainingError
from modularbase.training.lesson import Fact, error_table
from modularbase.training.live_protocol import LiveOptions, LiveReport
from modularbase.training.trainer_process import TrainerProcess, trainer_command

_PACK = "linux_errors"
_SHOWN = "ENOTTY"  # famous for its answer
_N_QUIZ = 20
_SERVE_S = 60.0  # that a generation may take until it serves


def live(
    base: Base = DEFAULT_BASE,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long it may take, about.")] = 5.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to train, however long they take.")
    ] = None,
    publishes: Annotated[int, typer.Option(min=1, help="Generations to publish.")] = 30,
    channel: Annotated[str, typer.Option(help="Name of the shared memory.")] = "demo-live",
    seed: Annotated[int, typer.Option(min=0, help="Of the pack's first weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Trains a pack in one process, and asks it in another after every publish.

    The pack learns this system's errors from nothing. Its weights go through shared memory
    into the running engine: nothing restarts, and nothing is written to the disk. What it learns
    are facts by heart, and it is asked those that it is taught.
    """
    need_extra()
    if steps is not None and steps < publishes:
        raise InvalidRequestError("steps", f"{publishes} or more, one a publish", str(steps))
    begin_s = time.monotonic()
    with Engine.load(base, n_threads=1) as engine:
        options = LiveOptions(
            base=Path(engine.info["path"]),
            channel=channel,
            end_s=begin_s + 60 * minutes,
            n_publishes=publishes,
            n_steps=steps or 0,
            seed=seed,
        )
        command = trainer_command(options)
        with TrainerProcess(command, channel) as trainer, OtherUser(engine) as other:
            err.print(f"engine: process {os.getpid()}; trainer: process {trainer.pid}")
            session = _Session(engine, trainer, other, begin_s, as_json)
            session.run(channel, publishes)


class _Session:
    """Asks every generation the same."""

    def __init__(
        self,
        engine: Engine,
        trainer: TrainerProcess,
        other: OtherUser,
        begin_s: float,
        as_json: bool,
    ) -> None:
        facts = error_table()
        self._shown = next(fact for fact in facts if fact.name == _SHOWN)
        self._quiz: Sequence[Fact] = facts[:: len(facts) // _N_QUIZ][:_N_QUIZ]
        self._engine, self._trainer, self._other = engine, trainer, other
        self._begin_s = begin_s
        self._view: View
        if as_json:
            self._view = JsonView()
        elif out.is_terminal:
            self._view = ScreenView(self._shown, trainer, other)
        else:
            self._view = LineView()

    def run(self, channel: str, n_publishes: int) -> None:
        """Until the last generation has answered."""
        with self._view.shown():
            self._answer(LiveReport(step=0, n_steps=0), (), None)
            self._trainer.wait_open()
            with self._engine.attach(_PACK, channel=channel) as attachment:
                served = 0
                while served < n_publishes:
                    was_ahead = self._trainer.n_published == served
                    self._trainer.wait_published(served + 1)
                    served = self._wait_served(attachment, self._trainer.n_published)
                    report = self._trainer.wait_published(served)
                    since_s = report.published_at_s if was_ahead else None
                    self._answer(report, (_PACK,), since_s)

    def _wait_served(self, attachment: Attachment, generation: int) -> int:
        try:
            return attachment.wait(generation, _SERVE_S)
        except ChannelError:
            self._trainer.check()  # its end explains it better
            raise
        except TimeoutError as error:
            raise TrainingError(str(error)) from error

    def _answer(self, report: LiveReport, packs: Sequence[str], since_s: float | None) -> None:
        answers = ask(self._engine, self._shown, self._quiz, packs, self._view.answering)
        self._other.check()
        delay_s = None if since_s is None else answers.first_token_at_s - since_s
        self._view.answered(
            LiveRow(
                elapsed_s=time.monotonic() - self._begin_s,
                generation=report.generation,
                step=report.step,
                n_steps=report.n_steps,
                loss=report.loss,
                question=self._shown.question,
                expected=self._shown.answer,
                answer=answers.answer,
                is_right=answers.is_right,
                n_right=answers.n_right,
                n_questions=len(self._quiz),
                perplexity=answers.perplexity,
                reworded_perplexity=answers.reworded_perplexity,
                first_token_ms=None if delay_s is None else 1e3 * delay_s,
                other_requests=self._other.n_requests,
                other_tokens=self._other.n_tokens,
                longest_gap_ms=self._other.longest_gap_ms,
            )
        )
