"""`modularbase train router`: which packs a text is for, from the base's hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from modularbase.bases import install
from modularbase.cli.console import DEFAULT_BASE, Base, Json, err, out, print_facts, print_json
from modularbase.cli.labelled_packs import LabelledPacks, parse_labelled
from modularbase.cli.train_run import need_extra, typed_command

if TYPE_CHECKING:
    from modularbase.training.router import RouterOptions, RouterReport


def router(
    project: Annotated[Path, typer.Argument(help="Project folder; made where there is none.")],
    packs: LabelledPacks,
    neutral: Annotated[
        list[Path], typer.Option(help="Text that is for none of the packs; may be repeated.")
    ],
    base: Base = DEFAULT_BASE,
    layer: Annotated[
        int | None,
        typer.Option(help="Take the states entering it; by default as before, or the middle."),
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"] | None,
        typer.Option(help="How a text's states become one; by default the project's, or mean."),
    ] = None,
    snippets: Annotated[int, typer.Option(help="Most pieces of text of each pack.")] = 400,
    snippet_tokens: Annotated[tuple[int, int], typer.Option(help="Shortest and longest piece.")] = (
        8,
        64,
    ),
    weight_decay: Annotated[float, typer.Option(help="Weight of the squared weights.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the pieces and their split.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Trains a router: which packs a text is for, told from the resident base's hidden states.

    Nothing else is trained. The weights go to the project's weights/ folder; `pack build` makes a
    router pack of them.
    """
    need_extra()
    from modularbase.training.router import RouterOptions, train_router
    from modularbase.training.router_project import (
        check_matches,
        open_router_project,
        trained_router,
    )

    path = install.resolve(base, install=True)
    labelled = parse_labelled(packs)
    open_router_project(project, path)
    known = trained_router(project)
    options = RouterOptions(
        base=path,
        packs=labelled,
        neutral=tuple(neutral),
        layer=known.layer if layer is None and known else layer,
        pooling=pooling or (known.pooling if known else "mean"),
        n_snippets=snippets,
        snippet_tokens=snippet_tokens,
        weight_decay=weight_decay,
        seed=seed,
        n_threads=threads or 0,
    )
    if options.layer is not None:
        routed = tuple(each.pack for each in labelled)
        check_matches(project, "router", (routed, options.layer, options.pooling))
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("reading", total=None)
        report = train_router(
            options, lambda n, n_all: progress.update(task, completed=n, total=n_all)
        )
    weights = _save(project, options, report)
    _print_report(report, weights, as_json)


def _save(project: Path, options: RouterOptions, report: RouterReport) -> Path:
    from modularbase.packs.manifest import Training
    from modularbase.training.router_project import TrainedHead, save_head

    sources = [
        *(f"{labelled.pack.id}: {path}" for labelled in options.packs for path in labelled.paths),
        *(f"neutral: {path}" for path in options.neutral),
    ]
    training = Training(command=typed_command(), seed=options.seed, data=tuple(sources))
    head = TrainedHead(
        "router",
        report.head,
        report.layer,
        options.pooling,
        tuple(labelled.pack for labelled in options.packs),
        {"accuracy": report.accuracy, "calibration error": report.calibration_error},
    )
    return save_head(project, head, training)


def _print_report(report: RouterReport, weights: Path, as_json: bool) -> None:
    facts = {
        "weights": str(weights),
        "layer": report.layer,
        "n_train": report.n_train,
        "accuracy": report.accuracy,
        "temperature": report.head.temperature,
        "calibration_error": report.calibration_error,
        "uncalibrated_error": report.uncalibrated_error,
    }
    if as_json:
        print_json({**facts, "labels": report.labels, "confusion": report.confusion})
        return
    table = Table("text for", *report.labels, title="found", title_justify="right")
    for label, row in zip(report.labels, report.confusion, strict=True):
        table.add_row(label, *map(str, row))
    out.print(table)
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items()}
    print_facts(shown, "trained")
