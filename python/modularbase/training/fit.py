"""A run: parts of a pack learn a domain against the frozen base, and leave other text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modularbase.training.curves import draw_curves
from modularbase.training.distillation import objective_of
from modularbase.training.engine_states import StateReport, StateWatch
from modularbase.training.interruption import interruptions
from modularbase.training.options import TrainOptions
from modularbase.training.pack_module import PackModule
from modularbase.training.preparation import prepare
from modularbase.training.run_folder import RunFolder, RunLog
from modularbase.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class StepReport:
    """Where a run is.

    Attributes:
        step: Steps done.
        n_steps: Steps to do.
        loss: Of the last step, in nats a token; None before the first.
        heldout_loss: Of the last measurement.
        tokens_per_s: Of the last step.
    """

    step: int
    n_steps: int
    loss: float | None
    heldout_loss: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a run ended.

    Attributes:
        run: Its folder.
        pack: The pack with its best weights.
        n_steps: Steps done.
        best_step: The step with the lowest held-out loss, whose weights the pack has; KL on
            neutral text counts, as it does in training.
        n_tokens: Tokens trained on.
        stopped_early: Whether it ended because nothing got better.
        base: Held-out figures of the plain base: perplexity, and neutral_perplexity.
        start: Those of the pack that the run began with, with neutral_kl; a new one is the base.
        figures: The trained pack's, with neutral_kl.
    """

    run: Path
    pack: PackModule
    n_steps: int
    best_step: int
    n_tokens: int
    stopped_early: bool
    base: dict[str, float]
    start: dict[str, float]
    figures: dict[str, float]


_FIGURES = ("perplexity", "teacher_kl", "neutral_perplexity", "neutral_kl")

Watch = Callable[[StepReport], None]


def no_watch(report: StepReport) -> None:
    """Takes reports and says nothing."""


def no_state_watch(report: StateReport) -> None:
    """Takes reports and says nothing."""


def fit(
    options: TrainOptions, watch: Watch = no_watch, state_watch: StateWatch = no_state_watch
) -> FitReport:
    """Trains a project's pack.

    Ctrl-C or SIGTERM ends the run behind its current step, with a checkpoint from which `resume`
    goes on.

    Args:
        options: What to do.
        watch: Called behind every step.
        state_watch: Called for every block that an engine computes, before the first step.

    Raises:
        InvalidRequestError: Options or text make no sense.
        PackFormatError: The project is not sound.
        BaseLoadError: The base cannot be trained on, or the teacher not be loaded.
        TeacherError: The teacher has another vocabulary.
        TrainingError: The loss is not finite any more, or the engine process failed.
        KeyboardInterrupt: Somebody pressed Ctrl-C.
        SystemExit: Somebody sent SIGTERM; its code is 143.
    """
    with objective_of(options) as objective:
        trainer, pack = prepare(options, objective, state_watch)
        return _run(RunFolder.create(options), options, trainer, pack, watch)


def resume(
    project: Path, watch: Watch = no_watch, state_watch: StateWatch = no_state_watch
) -> FitReport:
    """Goes on with a project's newest run, exactly as if it had not stopped.

    Args:
        project: Its folder.
        watch: Called behind every step.
        state_watch: As in `fit`.

    Raises:
        InvalidRequestError: There is no run, or its text has changed.
        ModularBaseError: As in `fit`.
    """
    folder = RunFolder.latest(project)
    options = folder.options()
    with objective_of(options) as objective:
        trainer, pack = prepare(options, objective, state_watch)
        state = folder.load()
        if state is not None:
            trainer.restore(state)
        folder.forget_after(trainer.step if state is not None else -1)
        return _run(folder, options, trainer, pack, watch)


def _run(
    folder: RunFolder, options: TrainOptions, trainer: Trainer, pack: PackModule, watch: Watch
) -> FitReport:
    loss, speed = None, 0.0
    ends = (options.qat_start, options.steps)
    with RunLog(folder, trainer.step + 1) as log, interruptions() as interruption:
        if trainer.step == 0:
            start = trainer.measure()  # a new pack is the identity
            plain = trainer.measure_base() if options.parent else start
            log.write("base", 0, plain.figures())
            log.write("heldout", 0, start.figures())
        heldout = folder.measured()[-1]["loss"]
        watch(StepReport(trainer.step, options.steps, loss, heldout, speed))
        while trainer.step < options.steps and not _is_done(trainer, options):
            figures = trainer.train_step()
            loss, speed = figures["loss"], figures["tokens_per_s"]
            log.write("train", trainer.step, figures)
            if trainer.step % options.eval_every == 0 or trainer.step in ends:
                measured = trainer.measure()
                heldout = measured.loss
                log.write("heldout", trainer.step, measured.figures())
            watch(StepReport(trainer.step, options.steps, loss, heldout, speed))
            if interruption.signal:
                break
            if trainer.step % options.save_every == 0 and trainer.step < options.steps:
                folder.save(trainer.state())
        folder.save(trainer.state())
    draw_curves(folder.metrics(), folder.curves)
    interruption.take_effect()
    pack.load_state_dict(trainer.best_weights)
    return _report(folder, options, trainer, pack)


def _is_done(trainer: Trainer, options: TrainOptions) -> bool:
    return 0 < options.patience <= trainer.n_worse


def _report(
    folder: RunFolder, options: TrainOptions, trainer: Trainer, pack: PackModule
) -> FitReport:
    base, *measured = folder.measured()
    best = next(row for row in measured if row["step"] == trainer.best[1])
    return FitReport(
        run=folder.path,
        pack=pack,
        n_steps=trainer.step,
        best_step=trainer.best[1],
        n_tokens=trainer.n_tokens,
        stopped_early=trainer.step < options.steps,
        base=_figures(base, *_FIGURES[:-1]),
        start=_figures(measured[0], *_FIGURES),
        figures=_figures(best, *_FIGURES),
    )


def _figures(row: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: row[name] for name in names if name in row}
