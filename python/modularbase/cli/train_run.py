"""What the training commands do alike: the bar, an interruption, the report."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from modularbase.cli.console import err, print_facts, print_json
from modularbase.errors import TrainingError

if TYPE_CHECKING:
    from modularbase.training.engine_states import StateReport, StateWatch
    from modularbase.training.fit import FitReport, StepReport, Watch
    from modularbase.training.options import TrainOptions

_EXTRA = ("torch", "transformers", "safetensors", "tensorboard", "matplotlib")


def run_options(options: TrainOptions) -> FitReport:
    """Runs `fit` with a bar."""
    from modularbase.training.fit import fit

    if not options.neutral:
        err.print("no --neutral text: nothing holds the pack to the base outside its domain")
    with training_bars() as (watch, state_watch):
        return fit(options, watch, state_watch=state_watch)


@contextmanager
def telling_how_to_resume(project: Path) -> Iterator[None]:
    """Where a run is interrupted, says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        place = shlex.quote(str(project))
        err.print(f"stopped; to go on: modularbase train fit {place} --resume", markup=False)
        raise


def save_and_print(options: TrainOptions, report: FitReport, licence: str, as_json: bool) -> None:
    """Puts a finished run's pack into its project, and prints how the run ended."""
    from modularbase.training.export import save_result

    weights = save_result(options, report, command=typed_command(), licence=licence)
    print_report(report, weights, as_json)


def typed_command() -> str:
    """The command line of this process, for the manifest."""
    return shlex.join(["modularbase", *sys.argv[1:]])


def need_extra() -> None:
    """Says how to install what training needs, where it is missing.

    Raises:
        TrainingError: Something is missing.
    """
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise TrainingError(f"needs {names}; to install: pip install 'modularbase[train]'")


@contextmanager
def training_bars() -> Iterator[tuple[Watch, StateWatch]]:
    """Gives watches that move the bars of the training, and of the engine where there is one."""
    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err) as progress:
        engine = progress.add_task("", title="engine", total=None, visible=False)
        task = progress.add_task("measuring the base", title="training", total=None)

        def show_states(report: StateReport) -> None:
            if report.notice:
                err.print(report.notice, markup=False)
            if not progress.tasks[engine].visible:
                place = f"states: {report.n_bytes / 1e6:.0f} MB in {report.folder}"
                err.print(place, markup=False, soft_wrap=True)
            progress.update(engine, visible=True, total=report.n_blocks, completed=report.n_done)

        def show(report: StepReport) -> None:
            parts = [f"held-out {report.heldout_loss:.3f}"]
            if report.loss is not None:
                parts = [f"loss {report.loss:.3f}", *parts, f"{report.tokens_per_s:.0f} tokens/s"]
            progress.update(
                task, total=report.n_steps, completed=report.step, description=" ".join(parts)
            )

        yield show, show_states


def print_report(report: FitReport, weights: Path, as_json: bool) -> None:
    """Prints how a run ended."""
    facts = {
        "run": str(report.run),
        "weights": str(weights),
        "n_steps": report.n_steps,
        "best_step": report.best_step,
        "stopped_early": report.stopped_early,
        "n_tokens": report.n_tokens,
        "base": report.base,
        "start": report.start,
        "pack": report.figures,
    }
    if as_json:
        print_json(facts)
        return
    if report.start["perplexity"] == report.base["perplexity"]:  # a new pack is the identity
        facts["start"] = {}
    for kind in ("base", "start", "pack"):
        figures = facts.pop(kind)
        assert isinstance(figures, dict)
        facts |= {f"{kind} {name}": f"{value:.4g}" for name, value in figures.items()}
    print_facts(facts, "trained")
