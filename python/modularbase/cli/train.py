"""`modularbase train`: packs that learn; needs the extra `modularbase[train]`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from modularbase.bases import install
from modularbase.cli.console import Json, err, print_facts, print_json
from modularbase.errors import InvalidRequestError, TrainingError
from modularbase.packs.project import read_config

if TYPE_CHECKING:
    from modularbase.training.fit import FitReport, StepReport, Watch
    from modularbase.training.options import TrainOptions

train_app = typer.Typer(no_args_is_help=True)

_EXTRA = ("torch", "transformers", "safetensors", "tensorboard", "matplotlib")


@train_app.callback()
def train() -> None:
    """Train packs in PyTorch."""


Paths = list[Path] | None


@train_app.command()
def fit(
    project: Annotated[Path, typer.Argument(help="Project folder, as `pack init` makes it.")],
    data: Annotated[
        Paths, typer.Option(help="Text of the domain: files or folders; may be repeated.")
    ] = None,
    heldout: Annotated[
        Paths, typer.Option(help="Text to measure on; else drawn from data.")
    ] = None,
    neutral: Annotated[
        Paths, typer.Option(help="Other text, on which the pack is held to the base.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Instead of the project's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser.")] = None,
    batch_blocks: Annotated[int | None, typer.Option(help="Sequences of a step.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    neutral_share: Annotated[float | None, typer.Option(help="Share of neutral sequences.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps in which the rate rises.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forwards a step is cut into.")] = None,
    precision: Annotated[
        Literal["auto", "f32", "bf16"] | None, typer.Option(help="Type of the products.")
    ] = None,
    heldout_blocks: Annotated[
        int | None, typer.Option(help="Most sequences to measure on, of each kind of text.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Measurements without a better one that end the run; 0: off.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
    data_licence: Annotated[str, typer.Option(help="Licence of the text, for the manifest.")] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run, as it was told.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trains a project's pack against the frozen base (stage 1).

    The weights go to the project's weights/ folder, for `pack build`; checkpoints, logs and curves
    to a new folder in runs/. What no option says, train.toml does.
    """
    given: dict[str, Any] = {
        "steps": steps,
        "batch_blocks": batch_blocks,
        "block_tokens": block_tokens,
        "neutral_share": neutral_share,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "accumulation": accumulation,
        "precision": precision,
        "heldout_blocks": heldout_blocks,
        "eval_every": eval_every,
        "patience": patience,
        "save_every": save_every,
        "seed": seed,
        "device": device,
        "n_threads": threads,
    }
    for name, paths in (("data", data), ("heldout", heldout), ("neutral", neutral)):
        given[name] = tuple(paths) if paths else None
    given = {name: value for name, value in given.items() if value is not None}
    _need_extra()
    from modularbase.training.export import check_target, save_result

    check_target(project)
    try:
        run = _resumed if resume else _fitted
        options, report = run(project, given, base)
    except KeyboardInterrupt:
        place = shlex.quote(str(project))
        err.print(f"stopped; to go on: modularbase train fit {place} --resume", markup=False)
        raise
    command = shlex.join(["modularbase", *sys.argv[1:]])
    weights = save_result(options, report, command=command, licence=data_licence)
    _print_report(report, weights, as_json)


def _fitted(
    project: Path, given: dict[str, Any], base: str | None
) -> tuple[TrainOptions, FitReport]:
    from modularbase.training.fit import fit as run

    options = _options(project, given, base)
    if not options.neutral:
        err.print("no --neutral text: nothing holds the pack to the base outside its domain")
    with _bar() as watch:
        return options, run(options, watch)


def _resumed(
    project: Path, given: dict[str, Any], base: str | None
) -> tuple[TrainOptions, FitReport]:
    from modularbase.training.fit import resume as run
    from modularbase.training.run_folder import RunFolder

    if given or base:
        names = ", ".join([*given, *(["base"] if base else [])])
        raise InvalidRequestError("--resume", "no options but those the run began with", names)
    options = replace(RunFolder.latest(project).options(), project=project)
    with _bar() as watch:
        return options, run(project, watch)


def _options(project: Path, given: dict[str, Any], base: str | None) -> TrainOptions:
    from modularbase.training.options import TrainOptions

    config = read_config(project)
    said = config.optimisation
    block_tokens = given.get("block_tokens", 256)
    defaults = {
        "steps": said.steps,
        "batch_blocks": max(1, said.batch_tokens // max(1, block_tokens)),
        "learning_rate": said.learning_rate,
        "warmup_steps": said.warmup_steps,
        "seed": said.seed,
    }
    path = install.resolve(base or config.base, install=True)
    return TrainOptions(project=project, base=path, **{**defaults, **given})


def _need_extra() -> None:
    import importlib.util

    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise TrainingError(f"needs {names}; to install: pip install 'modularbase[train]'")


@contextmanager
def _bar() -> Iterator[Watch]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("measuring the base", total=None)

        def show(report: StepReport) -> None:
            parts = [f"held-out {report.heldout_loss:.3f}"]
            if report.loss is not None:
                parts = [f"loss {report.loss:.3f}", *parts, f"{report.tokens_per_s:.0f} tokens/s"]
            progress.update(
                task, total=report.n_steps, completed=report.step, description=" ".join(parts)
            )

        yield show


def _print_report(report: FitReport, weights: Path, as_json: bool) -> None:
    facts = {
        "run": str(report.run),
        "weights": str(weights),
        "n_steps": report.n_steps,
        "best_step": report.best_step,
        "stopped_early": report.stopped_early,
        "n_tokens": report.n_tokens,
        "base": report.base,
        "pack": report.figures,
    }
    if as_json:
        print_json(facts)
        return
    for kind in ("base", "pack"):
        figures = facts.pop(kind)
        assert isinstance(figures, dict)
        facts |= {f"{kind} {name}": f"{value:.4g}" for name, value in figures.items()}
    print_facts(facts, "trained")
