"""`modularbase train fit`: stage 1, a pack learns its domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modularbase.bases import install
from modularbase.byte_sizes import parse_bytes
from modularbase.cli import train_options as o
from modularbase.cli.console import Json
from modularbase.cli.train_run import (
    need_extra,
    run_options,
    save_and_print,
    telling_how_to_resume,
    training_bars,
)
from modularbase.errors import InvalidRequestError
from modularbase.packs.project import read_config

if TYPE_CHECKING:
    from modularbase.training.fit import FitReport
    from modularbase.training.options import TrainOptions


def fit(
    project: o.Project,
    data: o.Data = None,
    heldout: o.HeldOut = None,
    neutral: o.Neutral = None,
    base: o.ProjectBase = None,
    steps: o.Steps = None,
    batch_blocks: o.BatchBlocks = None,
    block_tokens: o.BlockTokens = None,
    neutral_share: o.NeutralShare = None,
    learning_rate: o.LearningRate = None,
    rate: o.PartRate = None,
    warmup_steps: o.WarmupSteps = None,
    qat_steps: o.QatSteps = None,
    accumulation: o.Accumulation = None,
    precision: o.Precision = None,
    heldout_blocks: o.HeldOutBlocks = None,
    eval_every: o.EvalEvery = None,
    patience: o.Patience = None,
    save_every: o.SaveEvery = None,
    seed: o.Seed = None,
    device: o.Device = None,
    threads: o.Threads = None,
    from_engine: o.FromEngine = False,
    state_cache: o.StateCache = None,
    data_licence: o.DataLicence = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run, as it was told.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trains a project's pack against the frozen base (stage 1).

    The weights go to the project's weights/ folder, for `pack build`; checkpoints, logs and curves
    to a new folder in runs/. What no option says, train.toml does.
    """
    given = o.given(
        data=data,
        heldout=heldout,
        neutral=neutral,
        steps=steps,
        batch_blocks=batch_blocks,
        block_tokens=block_tokens,
        neutral_share=neutral_share,
        learning_rate=learning_rate,
        rates=o.part_rates(rate),
        warmup_steps=warmup_steps,
        qat_steps=qat_steps,
        accumulation=accumulation,
        precision=precision,
        heldout_blocks=heldout_blocks,
        eval_every=eval_every,
        patience=patience,
        save_every=save_every,
        seed=seed,
        device=device,
        n_threads=threads,
        from_engine=from_engine or None,
        state_cache_bytes=state_cache and parse_bytes("--state-cache", state_cache),
    )
    need_extra()
    from modularbase.training.export import check_target

    check_target(project)
    with telling_how_to_resume(project):
        run = _resumed if resume else _fitted
        options, report = run(project, given, base)
    save_and_print(options, report, data_licence, as_json)


def _fitted(
    project: Path, given: dict[str, Any], base: str | None
) -> tuple[TrainOptions, FitReport]:
    options = fit_options(project, given, base)
    return options, run_options(options)


def _resumed(
    project: Path, given: dict[str, Any], base: str | None
) -> tuple[TrainOptions, FitReport]:
    from modularbase.training.fit import resume as run
    from modularbase.training.run_folder import RunFolder

    if given or base:
        names = ", ".join([*given, *(["base"] if base else [])])
        raise InvalidRequestError("--resume", "no options but those the run began with", names)
    options = RunFolder.latest(project).options()
    with training_bars() as (watch, state_watch):
        return options, run(project, watch, state_watch=state_watch)


def fit_options(project: Path, given: dict[str, Any], base: str | None) -> TrainOptions:
    """The run that the given options and train.toml ask for; base None: the project's."""
    from modularbase.training.options import configured

    path = install.resolve(base or read_config(project).base, install=True)
    return configured(project, path, given)
